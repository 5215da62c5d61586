"""Rows and features on disk, so that memory does not grow with the data: what is read lies in Arrow files that the system maps into memory.

Files of one run have no name and vanish with it, however it ends. Features are kept for the next run as well, in folders of the Hugging
Face datasets cache (`$HF_DATASETS_CACHE`), which may be deleted at any time.
"""

import functools
import hashlib
import itertools
import json
import mmap
import os
import pickle
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from recipes.common.errors import UserError

CHUNK = 1000  # rows in memory at a time
FORGET = 100  # so many chunks are read between two calls of `forget`
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")  # which have a say in what a row becomes


_mapped = weakref.WeakSet()  # the files of the tables that are in use


class Stored(Sequence):
    """Dicts in a file on disk. Like a list of them, but that slices, `take` and `+` copy no row and nothing can be set.

    They know where they were read: `names`, and of each row an entry (index of its name, row, line) in `places`, 0 for what has none.
    """

    def __init__(self, rows: pa.ChunkedArray, order: np.ndarray, names: Sequence[str] = (), places: np.ndarray | None = None):
        self._rows, self._order, self._names, self._places = rows, order, tuple(names), places

    def __len__(self):
        return len(self._order)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return Stored(self._rows, self._order[at], self._names, self._places)
        return pickle.loads(self._rows[int(self._order[at])].as_buffer())

    def __add__(self, other: "Stored"):
        rows = pa.chunked_array([*self._rows.chunks, *other._rows.chunks], self._rows.type)
        placed = self._places is not None and other._places is not None
        places = np.concatenate([self._places, other._places + np.array([[len(self._names), 0, 0]], dtype=np.int32)]) if placed else None
        return Stored(rows, np.concatenate([self._order, other._order + len(self._rows)]), self._names + other._names, places)

    def __eq__(self, other):
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    def __reduce__(self):
        """To another process go its own rows, as the bytes that they are kept in."""
        return _restored, ([self._rows[int(at)].as_py() for at in self._order],)

    def take(self, indices) -> "Stored":
        """The rows at these indices, in this order; an index may come twice."""
        return Stored(self._rows, self._order[np.asarray(indices, dtype=np.int64)], self._names, self._places)

    def placed(self, names: Sequence[str], places: array) -> "Stored":
        """The same rows, which are told where they were read: `places` has three numbers a row."""
        return Stored(self._rows, self._order, names, np.array(places, dtype=np.int32).reshape(-1, 3))

    def number(self, at: int) -> int:
        """The number that row `at`, of a source that was read, has in its file."""
        return int(self._places[self._order[at], 1])

    def where(self, at: int, named: bool = True) -> str | None:
        """The file and row that row `at` was read from, in words; without `named`, the file only where there are several."""
        if self._places is None:
            return None
        name, row, line = self._places[self._order[at]]
        words = [self._names[name]] if named or len(self._names) > 1 or not row else []
        return ", ".join(words + ([f"row {row}" + (f" (line {line})" if line else "")] if row else []))


def expanded(rows: Sequence[dict], make: Callable[[dict], Iterable[dict]]) -> Stored:
    """What `make` makes of each row, on disk; each knows the place of the row that it is from."""
    origins = array("q")

    def each():
        for at, row in enumerate(rows):
            for one in make(row):
                origins.append(at)
                yield one

    made = store(each())
    if isinstance(rows, Stored) and rows._places is not None:
        made = made.placed(rows._names, rows._places[rows._order[np.array(origins, dtype=np.int64)]])
    return made


def _restored(rows: list[bytes]) -> Stored:
    return Stored(pa.chunked_array([pa.array(rows, pa.large_binary())]), np.arange(len(rows)))


def store(rows: Iterable[dict]) -> Stored:
    """Write `rows` to disk, one at a time. Pickled, as JSON does not keep every type; nobody else can write to a file without a name."""
    pickled = (pickle.dumps(row, protocol=5) for row in rows)
    chunks = iter(lambda: list(itertools.islice(pickled, CHUNK)), [])
    table = spill(pa.record_batch({"row": pa.array(chunk, pa.large_binary())}) for chunk in chunks)
    column = table["row"] if table else pa.chunked_array([], pa.large_binary())
    return Stored(column, np.arange(len(column)))


def spill(batches: Iterable[pa.RecordBatch]) -> pa.Table | None:
    """The batches as one table that lies in a file without a name; None if there are none. Raises `UserError` when the disk is full."""
    writer, file = None, tempfile.TemporaryFile(dir=cache())
    for batch in batches:
        try:
            writer = writer or pa.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
            file.flush()
        except OSError as error:
            raise UserError(f"{cache()} can't hold the rows ({error.strerror}): name a folder on a larger disk in "
                            "HF_DATASETS_CACHE") from error
    if writer is None:
        return None
    writer.close()
    file.flush()
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _mapped.add(mapped)
    return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()


def forget() -> None:
    """Give back the memory of what was read of the spilled tables; it is read again from disk when it is needed."""
    for mapped in list(_mapped):
        mapped.madvise(mmap.MADV_DONTNEED)


@functools.cache
def cache() -> Path:
    """The folder for rows and features. Raises `UserError` if it can't be made."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "recipes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder} can't be written ({error.strerror}): name another folder in HF_DATASETS_CACHE") from error
    return folder


def key(*what) -> str:
    """A name for what JSON can say of `what`, of this project's code and of the libraries that rows go through."""
    digest = hashlib.sha256(json.dumps([what, _code(), *map(version, LIBRARIES)], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def remembered(name: str, make: Callable[[], str]) -> str:
    """What `make` returns, or returned in an earlier run, which left it in the cache under `name` (from `key`)."""
    path = cache() / f"{name}.txt"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    made = make()
    try:
        with tempfile.TemporaryDirectory(dir=cache()) as work:
            (Path(work) / "whole").write_text(made, encoding="utf-8")
            os.replace(Path(work) / "whole", path)
    except OSError as error:
        raise UserError(f"{cache()} can't be written ({error.strerror}): name another folder in HF_DATASETS_CACHE") from error
    return made


@functools.cache
def _code() -> str:
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def kept(folder: Path) -> tuple[dict[str, datasets.Dataset], dict] | None:
    """The features by split and the record that `keep` left in `folder`; None if there are none, or if a byte of them has changed."""
    if not folder.is_dir():
        return None
    try:
        record = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        for split, sha256 in record["sha256"].items():
            with (folder / f"{split}.arrow").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise ValueError(f"{split}.arrow has changed")
        return {split: datasets.Dataset.from_file(str(folder / f"{split}.arrow")) for split in record["sha256"]}, record["record"]
    except (OSError, ValueError, KeyError) as error:
        print(f"note: the tokenized rows in {folder} are damaged ({error}): they are made again")
        shutil.rmtree(folder)
        return None


def keep(folder: Path, features: dict[str, datasets.Dataset], record: dict) -> None:
    """Write an entry of the cache, whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            whole, sha256 = Path(work) / "entry", {}
            whole.mkdir()
            for split, dataset in features.items():
                path = whole / f"{split}.arrow"
                with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, dataset.data.table.schema) as writer:
                    for number, batch in enumerate(dataset.data.table.to_batches()):
                        writer.write_batch(batch)
                        if number % FORGET == 0:
                            forget()
                with path.open("rb") as file:
                    sha256[split] = hashlib.file_digest(file, "sha256").hexdigest()
            (whole / "entry.json").write_text(json.dumps({"sha256": sha256, "record": record}), encoding="utf-8")
            if not folder.exists():  # another process may have been faster
                os.replace(whole, folder)
    except OSError as error:
        raise UserError(f"{folder} can't hold the tokenized rows ({error.strerror}): name a folder on a larger disk in "
                        "HF_DATASETS_CACHE") from error
