"""Rows -> features on disk: chunk by chunk, by several processes, in the order of the rows and with exact counts."""

import gc
import itertools
import multiprocessing
import os
import secrets
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable
from tqdm.auto import tqdm

from recipes.common import deadline, disk
from recipes.common.errors import UserError


class Refused(ValueError):
    """Raised by a task for a row that is a bad one for this model: what is wrong with it, and how to mend it."""

    def __init__(self, wrong: str, remedy: str):
        super().__init__(wrong, remedy)
        self.wrong, self.remedy = wrong, remedy


class Encoded(NamedTuple):
    """What became of the rows. Their numbers count from 1."""

    features: Dataset | None  # None if no row has any
    counts: Counter  # sums of what the task counted
    left_out: list[int]  # rows that the task made nothing of
    refused: dict[int, str]  # bad rows, a sentence each


# A row -> its features, or None to leave it out, and what to count of it. May raise `Refused`.
One = Callable[[dict], tuple[dict | None, dict]]


class _Chunk(NamedTuple):
    size: int
    features: pa.RecordBatch | None
    counts: Counter
    left_out: list[int]
    refused: dict[int, Refused]


def encode(rows: Sequence[dict], name: str, one: One, unit: str, on_bad_row: str, processes: int | None = None) -> Encoded:
    """Apply `one` to each row of `name`. Raises `UserError` for a bad row, unless they are to be skipped.

    A complaint names the file and row that a row was read from; for rows that were not, `name`, `unit` and the row's number.

    `processes`: default one a core. Few rows are encoded here, without any.
    """
    starts = range(0, len(rows), disk.CHUNK)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    processes = min(processes or cores, len(starts))
    counts, left_out, refused = Counter(), [], {}

    def batches() -> Iterator[pa.RecordBatch]:
        chunks = ((start, rows[start: start + disk.CHUNK]) for start in starts)
        with tqdm(desc=f"Tokenizing {Path(name).name}", total=len(rows), unit="rows", leave=False) as bar:
            for chunks_done, chunk in enumerate(_each(chunks, one, processes), start=1):
                for number, error in chunk.refused.items():
                    if on_bad_row == "stop":
                        raise UserError(f"{place(rows, number) or f'{name}, {unit} {number}'}: {error.wrong} ({error.remedy})")
                    refused[number] = f"{place(rows, number, named=False) or f'{unit} {number}'}: {error.wrong}"
                counts.update(chunk.counts)
                left_out.extend(chunk.left_out)
                bar.update(chunk.size)
                if chunks_done % disk.FORGET == 0:
                    disk.forget()
                if chunk.features is not None:
                    yield chunk.features

    return Encoded(_on_disk(batches()), counts, left_out, refused)


def place(rows: Sequence[dict], number: int, named: bool = True) -> str | None:
    """Where row `number` (from 1) of `rows` was read, in words; None for rows that were not read from a file."""
    return rows.where(number - 1, named) if isinstance(rows, disk.Stored) else None


def dataset(features: Iterable[dict]) -> Dataset | None:
    """Features as a dataset on disk, with some of them in memory at a time; None if there are none."""
    features = iter(features)
    return _on_disk(map(_batch, iter(lambda: list(itertools.islice(features, disk.CHUNK)), [])))


def _on_disk(batches: Iterable[pa.RecordBatch]) -> Dataset | None:
    table = disk.spill(batches)
    # A fingerprint of its own spares `datasets` one of all bytes.
    return None if table is None else Dataset(InMemoryTable(table), fingerprint=secrets.token_hex(8))


def _each(chunks: Iterator[tuple[int, Sequence[dict]]], one: One, processes: int) -> Iterator[_Chunk]:
    """The chunks encoded, in order; no more of them wait in memory than keep the processes busy."""
    if processes <= 1:
        yield from map(partial(_encode, one=one), chunks)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread a process; more would fight for the cores
    done, others = multiprocessing.Value("L", 0), set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, initializer=_start, initargs=(one, done))
    try:
        waiting = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 2 * processes:
                yield _result(waiting.popleft(), done)
        while waiting:
            yield _result(waiting.popleft(), done)
    except UserError:  # a process that hangs would be waited for below
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    except BrokenProcessPool as error:
        raise UserError("a process that tokenizes was ended from outside, most likely for want of memory: use fewer with "
                        "--preprocessing_num_workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future, done) -> _Chunk:
    """What a process of the pool made of a chunk. Raises `UserError` if none of them finishes a row in time."""
    with deadline.deadline("tokenizing"):
        before = -1
        while not wait([future], timeout=1).done:
            if before != (before := done.value):
                deadline.renew()
    return future.result()


def _encode(chunk: tuple[int, Sequence[dict]], one: One) -> _Chunk:
    start, rows = chunk
    features, counts, left_out, refused = [], Counter(), [], {}
    for number, row in enumerate(rows, start=start + 1):
        if _done is not None:
            with _done:
                _done.value += 1
        try:
            feature, counted = one(row)
        except Refused as error:
            refused[number] = error
            continue
        for what, n in counted.items():
            counts[what] += n
        if feature is None:
            left_out.append(number)
        else:
            features.append(feature)
    return _Chunk(len(rows), _batch(features) if features else None, counts, left_out, refused)


def _batch(features: list[dict]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(features, pa.schema([(name, _type(value)) for name, value in features[0].items()]))


def _type(value) -> pa.DataType:
    """How a feature is kept: the type must not depend on the rows of a chunk, one of which may have nothing but empty lists."""
    if isinstance(value, list):
        return pa.list_(pa.float64() if value and isinstance(value[0], float) else pa.int32())
    return pa.float64() if isinstance(value, float) else pa.int32()


_one = None  # in a process of the pool: its `one`, which is sent once and not with every chunk
_done = None  # and how many rows all of them have begun


def _start(one: One, done) -> None:
    global _one, _done
    _one, _done = one, done
    gc.freeze()  # what the run has loaded is no garbage: looking through it would copy its pages into each process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _work(chunk: tuple[int, Sequence[dict]]) -> _Chunk:
    return _encode(chunk, _one)
