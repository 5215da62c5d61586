"""Train rows that are read while the training goes on, pass after pass. Their source may be larger than the disk: nothing of it is kept.

A run that is resumed reads the same rows in the same order and passes over those it has trained on, as the Trainer counts its batches.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator

from torch.utils.data import IterableDataset

from recipes.common import data, deadline, encoding
from recipes.common.errors import UserError
from recipes.common.formats import File

LISTED = 1000  # rows left out that run.json names; all are counted


def files(names: str | list[str], columns: str | None, split: str | None = None) -> list[dict[str, File]]:
    """The files of each source by split, of which only the start is looked at. Raises `UserError` for one that can't be streamed."""
    found = data.identify(names, columns, whole=False, split=split)
    for file in (file for splits in found for file in splits.values()):
        if file.format == "json" or (file.format == "parquet" and file.gzipped):
            raise UserError(f"{file.name} can only be read whole, so --streaming can't read it: save it as JSON Lines, an object a line")
    if any(source.weight is not None for source in data.sources(names)):
        raise UserError("--streaming reads one source after the other, so they can't have weights: leave the weights out")
    return found


def rows(files: list[File], check: data.Check, columns: str | None, on_bad_row: str, skipped: Callable[[str], None]) -> Iterator[tuple]:
    """(file and row in words, the row) of each good row; `skipped` hears of the others. Raises `UserError`."""
    for file in files:
        number = 0
        try:
            for record in data.records(file, check, columns):
                number = record.number
                deadline.renew()
                if record.wrong is None:
                    yield f"{file.name}, {record.where}", record.row
                elif on_bad_row == "skip":
                    skipped(f"{file.name}, {record.where}: {record.wrong}")
                else:
                    raise UserError(f"{file.name}, {record.where}: {record.wrong} (--on_bad_row skip leaves such rows out and lists them)")
        except UnicodeDecodeError as error:
            raise UserError(f"{file.name}, after row {number}: no {file.encoding} text (byte {error.object[error.start]:#04x}); save the "
                            "file as UTF-8") from error


def shuffled(rows: Iterable, size: int, draw: random.Random) -> Iterator:
    """`rows` in an order that is random within some `size` of them, which is how many are in memory."""
    buffer = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
        else:
            at = draw.randrange(size)
            yield buffer[at]
            buffer[at] = row
    draw.shuffle(buffer)
    yield from buffer


class Stream(IterableDataset):
    """The features of the share that one of several processes has of the rows, without end.

    `read(skipped)` begins a pass over the rows, the first `held_out` of which are dev rows. `report` is kept up to date with what became
    of the rows, as it is in run.json.
    """

    def __init__(self, read, one: encoding.One, report: dict, shared, held_out: int, seed: int, process: int, processes: int):
        self.read, self.one, self.report, self.shared, self.held_out = read, one, report, shared, held_out
        self.seed, self.process, self.processes = seed, process, processes

    def __iter__(self):
        self.report |= {"rows": 0, "kept": 0, "shortened": 0, "tokens": 0, "supervised": 0, "skipped": 0, "left_out": [], "bad_rows": []}
        for number in itertools.count():
            kept, good = self.report["kept"], itertools.islice(self.read(self._skip), self.held_out, None)
            mixed = shuffled(good, self.shared.shuffle_buffer, random.Random(f"{self.seed} {number}"))
            for where, row in itertools.islice(mixed, self.process, None, self.processes):
                if self.held_out:
                    data.check_no_copies(self.report["source"], data.is_copy(row))
                feature = self._encode(where, row)
                if feature is not None:
                    yield feature
            if self.report["kept"] == kept:
                raise UserError(f"{self.report['source']}: no row is left to train on, after {self.held_out} dev rows (--max_eval_samples) "
                                f"and {self.report['skipped']} that were left out")

    def _encode(self, where: str, row: dict) -> dict | None:
        try:
            feature, counts = self.one(row)
        except encoding.Refused as error:
            if self.shared.on_bad_row == "stop":
                raise UserError(f"{where}: {error.wrong} ({error.remedy})") from error
            return self._skip(f"{where}: {error.wrong}")
        if feature is None:
            return self._skip(f"{where}: exceeds --max_length {self.shared.max_length}, or no part of it is trained on", "left_out")
        self.report["rows"] += 1
        self.report["kept"] += 1
        for name, n in counts.items():
            self.report[name] = self.report.get(name, 0) + n
        return feature

    def _skip(self, sentence: str, how: str = "bad_rows") -> None:
        self.report["rows"] += 1
        self.report["skipped"] += 1
        if len(self.report[how]) < LISTED:
            self.report[how].append(sentence)
        if self.process == 0 and self.report["skipped"] <= 5:
            print(f"skipped {sentence}" + (" (further ones are counted in run.json)" if self.report["skipped"] == 5 else ""))
