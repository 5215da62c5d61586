"""Files, folders and Hub data sets -> rows that keep the column contract (data/README.md). Every complaint names file, row and remedy.

What a row must look like is the task's business: it hands in `check`, a function from a row to a sentence on what is wrong with it, or
None. formats.py reads the bytes, shapes.py turns other shapes of a dialogue into ours; here rows become splits.
"""

import functools
import hashlib
import json
import math
import operator
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipes.common import disk, formats, shapes
from recipes.common.errors import UserError
from recipes.common.formats import File, Record
from recipes.common.shapes import (  # noqa: F401
    check_classify,
    check_dialogue,
    check_pretrain,
    check_tag,
    check_translate,
    check_turns,
    labelled_turns,
    short,
)

# First match wins. "validation" and "val" are what other tools write.
SPLITS = {"train": ("train",), "dev": ("dev", "validation", "val"), "test": ("test",)}
HUB_TIMEOUT = 5  # seconds to answer before the Hub counts as out of reach

Check = Callable[[dict], str | None]


@dataclass
class Rows:
    """The rows of one split and where they came from."""

    rows: disk.Stored
    source: str
    sha256: str  # of the file's bytes; of several sources, of their hashes
    skipped: list[str] = field(default_factory=list)  # one sentence for each row left out by on_bad_row="skip"
    notes: list[str] = field(default_factory=list)  # what the reader took for granted, changed or drew, a sentence each


class Source(NamedTuple):
    """One value of --data: a file, a folder or a Hub data set, and its weight."""

    name: str
    weight: float | None = None


def records(file: File, check: Check, columns: str | None = None) -> Iterator[Record]:
    """Records of `file` (from formats.identify), one at a time: columns renamed, dialogues brought into our shape, checked.

    `number` is the record's, `wrong` the complaint, if there is one; the rows of all records without one keep the contract. Memory
    does not grow with the file, except for a JSON array. Raises `UserError` where no row can be told from the next.
    """
    renames, used = parse_columns(columns), set()
    chat = _takes_dialogues(check)
    if file.columns is not None and (absent := [old for old in renames if old not in file.columns]):
        raise UserError(f"{file.name}: there is no column {short(absent[0])} to rename ({shapes.columns_of(file.columns)}); see --columns")
    for record in formats.records(file):
        row, wrong = record.row, record.wrong
        if wrong is None:
            used |= renames.keys() & row.keys()
            row, wrong = _rename(row, renames)
        if wrong is None and file.format == "csv":
            row, wrong = _read_lists(row)
        # Also where the check has nothing to say: a tool call with text beside it is one more turn to train on, if left as it stands.
        if wrong is None and ("messages" in row or check(row)):
            row, wrong = shapes.dialogue(row, pairs=chat)
        yield record._replace(row=row, wrong=wrong or check(row))
    if absent := [old for old in renames if old not in used and file.columns is None]:
        raise UserError(f"{file.name}: no row has a column {short(absent[0])} to rename; see --columns")


def read(path: Path | File, check: Check, on_bad_row: str = "stop", columns: str | None = None) -> Rows:
    """All rows of a file in any format that data/README.md names, or of a split that `find` gave. Raises `UserError`."""
    file = path if isinstance(path, File) else formats.identify(path, parse_columns(columns))
    skipped, context, chat = [], 0, _takes_dialogues(check)

    def good() -> Iterator[dict]:
        nonlocal context
        for record in records(file, check, columns):
            if record.wrong is None:
                context += shapes.context_turns(record.row) if chat else 0
                yield record.row
            elif on_bad_row == "skip":
                skipped.append(f"{record.where}: {record.wrong}")
            else:
                raise UserError(f"{file.name}, {record.where}: {record.wrong} (--on_bad_row skip leaves such rows out and lists them)")

    rows = disk.store(good())
    if not rows:
        raise UserError(f"{file.name} holds no usable row, as all {len(skipped)} are bad ones; the first, {skipped[0]}" if skipped else
                        f"{file.name} holds no row: data/README.md says what a file may hold")
    notes = [*file.notes, *([f"{file.name}: {context} assistant turns are context and not trained on (tool calls, history, "
                             '"train": false)'] if context else [])]
    return Rows(rows, file.name, file.sha256, skipped, notes)


def load(data: str | list[str], check: Check, dev_fraction: float, seed: int, on_bad_row: str = "stop",
         columns: str | None = None, files: list[dict[str, File]] | None = None) -> dict[str, Rows]:
    """Read the sources `data` into {"train": ..., "dev": ..., maybe "test": ...}. Raises `UserError`.

    A source is a file (train), a folder with train/dev/test files or a Hub data set, each maybe with a weight (`_mix`). Of the train
    rows of sources without a dev file, a share `dev_fraction`, drawn with `seed`, becomes dev. That happens before any row is repeated
    for its weight, and a row is a whole dialogue, so no dialogue ever stands on both sides. `files`: of each source, if `identify` has
    found them already.
    """
    asked = sources(data)
    parts = [{split: read(file, check, on_bad_row, columns) for split, file in found.items()} for found in files or identify(data, columns)]
    _hold_out(parts, dev_fraction, seed)
    splits = {split: join([part[split] for part in parts if split in part]) for split in SPLITS if any(split in part for part in parts)}
    if asked[0].weight is not None:
        _mix(splits["train"], [part["train"] for part in parts], [source.weight for source in asked], seed)
    return splits


def identify(data: str | list[str], columns: str | None = None, whole: bool = True) -> list[dict[str, File]]:
    """The files of each source by split, looked at `whole` or at their start. Raises `UserError` for one that can't be trained on."""
    identified = []
    for source in sources(data):
        found = find(source.name, whole)
        if "train" not in found:
            raise UserError(f"{source.name} has no train file, such as train.jsonl: training needs one")
        identified.append({split: file if isinstance(file, File) else formats.identify(file, parse_columns(columns), whole)
                           for split, file in found.items()})
    return identified


def load_split(data: str | list[str], split: str, check: Check, dev_fraction: float, seed: int, on_bad_row: str = "stop",
               columns: str | None = None) -> Rows | None:
    """The one split of `load`, without reading the others where that can be done; None if there is no such split."""
    found = [find(source.name) for source in sources(data)]
    if split == "test" or (split == "dev" and all("dev" in files for files in found)):
        parts = [read(files[split], check, on_bad_row, columns) for files in found if split in files]
        return join(parts) if parts else None
    return load(data, check, dev_fraction, seed, on_bad_row, columns)[split]


def sources(data: str | list[str]) -> list[Source]:
    """The sources that --data names, as NAME or NAME:WEIGHT; what follows a colon and is no number is a Hub data set's config."""
    found = []
    for value in [data] if isinstance(data, str) else data:
        name, colon, end = value.rpartition(":")
        if not colon or Path(value).exists() or not re.fullmatch(r"[-+.\deE]+|nan|inf", end, re.A):
            found.append(Source(value))
            continue
        try:
            weight = float(end)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UserError(f"--data {value}: the weight {end} is no number above 0; write a share, as in {name}:0.5")
        found.append(Source(name, weight))
    weighted = [source for source in found if source.weight is not None]
    if len(found) == 1 and weighted:
        raise UserError(f"--data {name}:{end}: a weight is a share among several sources, so one alone can't have any; leave it out "
                        "(--max_train_samples N trains on a part)")
    if 0 < len(weighted) < len(found):
        bare = next(source.name for source in found if source.weight is None)
        raise UserError(f"--data {bare} has no weight, but {weighted[0].name} has: give a weight to every source, or to none")
    return found


def find(data: str, whole: bool = True) -> dict[str, Path | File]:
    """The files of one source by split. A data set of the Hub is downloaded whole, or read from there. Raises `UserError` for none."""
    path = Path(data)
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^:/\\]+)?", data, re.A) and not formats.suggested(path):
            return _hub(data, whole)
        raise UserError(f"--data {data}: no such file or folder")
    found = {}
    for split, names in SPLITS.items():
        files = [[file for file in sorted(path.glob(f"{name}.*")) if file.is_file() and formats.suggested(file)
                  and file.name.lower().removesuffix(".gz").count(".") == 1] for name in names]
        first = next(filter(None, files), [])
        if len(first) > 1:
            raise UserError(f"--data {data}: the folder holds both {first[0].name} and {first[1].name}, so which is {split} is unclear; "
                            "move one away")
        found |= {split: first[0]} if first else {}
    if not found:
        raise UserError(f"--data {data}: the folder holds no train.jsonl, dev.jsonl or test.jsonl, nor such a file in another format "
                        "(data/README.md)")
    return found


def parse_columns(text: str | None) -> dict[str, str]:
    """`--columns new=old,...` as {old: new}. Raises `UserError`."""
    pairs = [pair.split("=") for pair in (text or "").split(",") if text]
    if any(len(pair) != 2 or not pair[0].strip() or not pair[1].strip() for pair in pairs):
        raise UserError(f"--columns {text}: write NEW=OLD, with a comma between two, as in source=question,target=answer")
    renames = {old.strip(): new.strip() for new, old in pairs}
    if len(renames) < len(pairs) or len(set(renames.values())) < len(pairs):
        raise UserError(f"--columns {text}: a column is named twice; give each once")
    return renames


def _takes_dialogues(check: Check) -> bool:
    """Whether `check` is that of a task which learns from any dialogue, as chat does, so that a question and an answer make a row of it."""
    return check({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}) is None and bool(check({}))


def _rename(row: dict, renames: dict[str, str]) -> tuple[dict, str | None]:
    for old, new in renames.items():
        if old not in row and new not in shapes.OPTIONAL:
            return row, f"there is no column {short(old)} to rename ({shapes.columns_of(row)}); see --columns"
        if old in row and new in row and new not in renames:
            return row, f"--columns {new}={old} would overwrite the column {short(new)}; rename that one too, as in other={new}"
    return {renames.get(name, name): value for name, value in row.items()}, None


def _read_lists(row: dict) -> tuple[dict, str | None]:
    """The lists that a CSV file holds as JSON; an empty field of the columns that may be missing counts as missing."""
    row = {name: value for name, value in row.items() if value or name not in shapes.OPTIONAL}
    for name in shapes.LISTS:
        if row.get(name, "").lstrip().startswith("["):
            row[name], wrong = shapes.parse(row[name])
            if wrong:
                return row, f'"{name}" begins like a JSON list but is none: {wrong}'
    return row, None


def _hold_out(parts: list[dict[str, Rows]], dev_fraction: float, seed: int) -> None:
    """Give a dev split to the sources that have none, from one draw over the train rows of them all."""
    without = [part for part in parts if "dev" not in part]
    size = sum(len(part["train"].rows) for part in without)
    if not without:
        return
    if size < 2 and without == parts:
        raise UserError(f"{parts[0]['train'].source} has one row: training needs at least two, as one is held out as dev")
    chosen = np.zeros(size, dtype=bool)
    chosen[list(held_out(size, dev_fraction, seed))] = True
    start = 0
    for part in without:
        train = part["train"]
        taken = chosen[start: start + len(train.rows)]
        start += len(taken)
        if taken.any():
            part["dev"] = Rows(train.rows.take(np.flatnonzero(taken)), f"{train.source} ({taken.sum()} rows held out, seed {seed})",
                               train.sha256)
        train.rows = train.rows.take(np.flatnonzero(~taken))


def held_out(size: int, dev_fraction: float, seed: int) -> set[int]:
    """Which of `size` train rows (at least two) become dev: a share, at least one, and never all of them."""
    return set(random.Random(seed).sample(range(size), min(max(1, round(size * dev_fraction)), size - 1)))


def join(parts: list[Rows]) -> Rows:
    """The rows of several sources, one source after the other."""
    if len(parts) == 1:
        return Rows(parts[0].rows, parts[0].source, parts[0].sha256, parts[0].skipped, [*parts[0].notes])
    return Rows(functools.reduce(operator.add, (part.rows for part in parts)), " + ".join(part.source for part in parts),
                hashlib.sha256("\n".join(part.sha256 for part in parts).encode()).hexdigest(),
                [f"{part.source}, {sentence}" for part in parts for sentence in part.skipped],
                [sentence for part in parts for sentence in part.notes])


def _mix(train: Rows, parts: list[Rows], weights: list[float], seed: int) -> None:
    """Draw `train` anew from its parts so that their shares are as their weights, and as many rows as all parts have together.

    A part that gives fewer rows than it has gives a draw without repeats. One that gives more gives each of its rows equally often,
    and a draw of its rows once more. The mixture is shuffled, so that its first N rows are mixed alike.
    """
    generator, total = random.Random(seed), len(train.rows)
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    for i in sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:  # the largest remainders
        counts[i] += 1
    indices, start = [], 0  # of the rows of all parts, one part after the other
    for part, weight, count in zip(parts, weights, counts, strict=True):
        size = len(part.rows)
        if not size or not count:
            raise UserError(f"{part.source} with weight {weight:g} would give no train row: "
                            f"{'raise its weight or leave it out' if size else 'its only row is held out as dev, so give it more rows'}")
        rounds, rest = divmod(count, size)
        own = range(start, start + size)
        indices += [*own] * rounds + generator.sample(own, rest)
        start += size
        effect = f"{size - count} rows are left out" if count < size else f"{count - size} are repeats" if count > size else "each row once"
        train.notes.append(f"{part.source} with weight {weight:g} gives {count} of the {total} train rows, {count / total:.1%}; "
                           f"it has {size}, so {effect}")
    generator.shuffle(indices)
    train.rows = train.rows.take(indices)


@functools.cache
def _hub(name: str, whole: bool = True) -> dict[str, File]:
    """The splits of the Hub data set NAME or NAME:CONFIG. Asks the Hub first, as `datasets` alone would try for half a minute."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils._http import httpx2

    repository, _, config = name.partition(":")
    offline = constants.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(repository, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        raise UserError(f"--data {name}: accept its licence on the Hub and log in first (hf auth login)") from None
    except RepositoryNotFoundError:
        raise UserError(f"--data {name}: no such file, folder or data set on the Hub") from None
    except (HfHubHTTPError, OSError, httpx2.HTTPError):
        constants.HF_HUB_OFFLINE = True  # for what follows: it may still be in the cache, and retries would take half a minute
    unreachable = constants.HF_HUB_OFFLINE
    try:
        loaded = datasets.load_dataset(repository, config or None, streaming=not whole)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        if unreachable:
            raise UserError(f"--data {name}: no such file or folder here, and no data set of that name is in the cache while the Hugging "
                            "Face Hub can't be reached; name a file or folder, or a mirror (HF_ENDPOINT=https://...)") from None
        raise UserError(f"--data {name}: the Hub's data set can't be loaded ({' '.join(str(error).split())[:300]})") from None
    finally:
        constants.HF_HUB_OFFLINE = offline
    if unreachable:
        print(f"note: the Hub can't be reached; {name} is taken from the cache")
    found = {split: next((hub_split(loaded[own], f"{name} ({own})", whole) for own in names if own in loaded), None)
             for split, names in SPLITS.items()}
    if not any(found.values()):
        raise UserError(f"--data {name}: the data set has no split train, dev, validation, val or test, but {', '.join(loaded)}")
    return {split: file for split, file in found.items() if file}


def hub_split(split, name: str, whole: bool = True) -> File:
    """A `datasets.Dataset`, or without `whole` an `IterableDataset`, as a file to read. Class numbers become their names; the hash is that
    of the rows, as JSON lines."""
    from datasets import ClassLabel, List

    def named(feature, value):
        if isinstance(feature, List) and value is not None:
            return [named(feature.feature, entry) for entry in value]
        return feature.int2str(value) if isinstance(feature, ClassLabel) and value is not None and value >= 0 else value

    def rows():
        return ({key: named((split.features or {}).get(key), value) for key, value in row.items()} for row in split)

    if not whole:
        return File(name, "hub", "streamed", columns=split.column_names, hub=rows)

    def sha256() -> str:
        digest = hashlib.sha256()
        for row in rows():
            digest.update(json.dumps(row, default=str).encode() + b"\n")
        return digest.hexdigest()

    # `datasets` names a split by its revision on the Hub, so the same name with the same files has the same rows: no need to read them.
    files = [(file["filename"], os.stat(file["filename"])) for file in split.cache_files]
    known = disk.key("hub", split._fingerprint, version("datasets"), [(path, stat.st_size, stat.st_mtime_ns) for path, stat in files])
    return File(name, "hub", disk.remembered(known, sha256), columns=split.column_names, hub=rows)
