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
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipes.common import deadline, disk, formats, shapes
from recipes.common.errors import UserError
from recipes.common.formats import File, Record, Shards
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
from recipes.common.wording import counted

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
    files: list[dict] = field(default_factory=list)  # of each file that was read for this split: rows read, kept, refused
    copies: int = 0  # rows that scripts/augment.py made of others


class Source(NamedTuple):
    """One value of --data: a file, a folder or a Hub data set, and its weight."""

    name: str
    weight: float | None = None


def records(file: File, check: Check, columns: str | None = None) -> Iterator[Record]:
    """Records of `file` (from formats.identify), one at a time: columns renamed, dialogues brought into our shape, checked.

    `number` is the record's, `wrong` the complaint, if there is one; the rows of all records without one keep the contract. Memory
    does not grow with the file, except for a JSON array. Raises `UserError` where no row can be told from the next.
    """
    if file.shards:
        for shard in file.shards:
            for record in records(shard, check, columns):
                yield record._replace(shard=Path(shard.name).name)
        return
    renames, used = parse_columns(columns), set()
    nested, chat = [old for old in renames if "." in old], _takes_dialogues(check)
    outermost = [*(file.columns or ()), *(old for old in nested if old.partition(".")[0] in (file.columns or ()))]
    if file.columns is not None and (absent := _absent(renames, outermost)):
        raise UserError(f"{file.name}: there is no column {short(absent[0])} to rename ({shapes.columns_of(file.columns)}); see --columns")
    for record in formats.records(file):
        row, wrong = record.row, record.wrong
        if wrong is None:
            row = _lifted(row, nested)
            used |= renames.keys() - {*_absent(renames, row)}
            row, wrong = _rename(row, _with_refs(renames) if "refs" in row else renames)
        if wrong is None and file.format == "csv":
            row, wrong = _read_lists(row)
        # Also where the check has nothing to say: a tool call with text beside it is one more turn to train on, if left as it stands.
        if wrong is None and ("messages" in row or check(row)):
            row, wrong = shapes.dialogue(row, pairs=chat)
        wrong = wrong or check(row)
        if wrong and record.number == 1 and file.format == "csv" and not shapes.NAMES & {*file.columns, *renames.values()}:
            wrong += "; the first line of the file was taken for the names of its columns"
        yield record._replace(row=row, wrong=wrong)
    if absent := [old for old in renames if old not in used and file.columns is None]:
        raise UserError(f"{file.name}: no row has a column {short(absent[0])} to rename; see --columns")


def read(path: Path | Shards | File, check: Check, on_bad_row: str = "stop", columns: str | None = None) -> Rows:
    """All rows of a file in any format that data/README.md names, or of a split that `find` gave. Raises `UserError`."""
    file = path if isinstance(path, File) else formats.identify(path, parse_columns(columns))
    skipped, context, copies, gone, chat = [], 0, 0, 0, _takes_dialogues(check)
    moved = _with_refs(parse_columns(columns)).get("refs") if check is check_translate else None
    shards = [Path(shard.name).name for shard in file.shards] or [None]
    index, places, refused = {shard: i for i, shard in enumerate(shards)}, array("q"), Counter()

    def good() -> Iterator[dict]:
        nonlocal context, copies, gone
        for record in deadline.timed(records(file, check, columns), file.name):
            if record.wrong is None:
                gone += moved in record.row
                context += shapes.context_turns(record.row) if chat else 0
                copies += is_copy(record.row)
                places.extend((index[record.shard], record.number, record.line or 0))
                yield record.row
            elif on_bad_row == "skip":
                refused[record.shard] += 1
                skipped.append(f"{record.where}: {record.wrong}")
            else:
                raise UserError(f"{file.name}, {record.where}: {record.wrong} (--on_bad_row skip leaves such rows out and lists them)")

    rows = disk.store(good()).placed([f"{file.name}, {shard}" if shard else file.name for shard in shards], places)
    if not rows:
        raise UserError(f"{file.name} holds no usable row, as all {len(skipped)} are bad ones; the first, {skipped[0]}" if skipped else
                        f"{file.name} holds no row: data/README.md says what a file may hold")
    notes = [*file.notes, *([f"{file.name}: {counted(context, 'assistant turn is|assistant turns are')} context and not trained on (tool "
                             'calls, history, "train": false)'] if context else []),
             *([f'{file.name}: {counted(gone, "row has|rows have")} "refs", which go with the column that was called target (now {moved}), '
                "and are no targets"] if gone else [])]
    kept = Counter(places[::3])
    counts = [{"name": part.name, "read": kept[i] + refused[shard], "kept": kept[i], "refused": refused[shard]}
              for i, (part, shard) in enumerate(zip(file.shards or [file], shards, strict=True))]
    return Rows(rows, file.name, file.sha256, skipped, notes, counts, copies)


def is_copy(row: dict) -> bool:
    """Whether scripts/augment.py made this row of another one."""
    return isinstance(row.get("augmented"), dict) and "method" in row["augmented"]


def check_no_copies(name: str, copies: int) -> None:
    """Raise `UserError` if dev rows would be drawn from rows among which are copies of others."""
    if copies:
        raise UserError(f"{name} holds altered copies of its rows (scripts/augment.py) and has no dev file: dev rows drawn from it would "
                        "have copies in train, and be copies, so their scores would mean nothing; put it as train.jsonl into a folder "
                        "with a dev.jsonl of other rows")


def load(data: str | list[str], check: Check, dev_fraction: float, seed: int, on_bad_row: str = "stop",
         columns: str | None = None, files: list[dict[str, File]] | None = None, split: str | None = None) -> dict[str, Rows]:
    """Read the sources `data` into {"train": ..., "dev": ..., maybe "test": ...}. Raises `UserError`.

    A source is a file (train), a folder with train/dev/test files or a Hub data set, each maybe with a weight (`_mix`). Of the train
    rows of sources without a dev file, a share `dev_fraction`, drawn with `seed`, becomes dev. That happens before any row is repeated
    for its weight, and a row is a whole dialogue, so no dialogue ever stands on both sides. `files`: of each source, if `identify` has
    found them already.
    """
    asked, files = sources(data), files or identify(data, columns, split=split)
    parts = [{name: read(file, check, on_bad_row, columns) for name, file in found.items()} for found in files]
    _hold_out(parts, dev_fraction, seed)
    splits = {split: join([part[split] for part in parts if split in part]) for split in SPLITS if any(split in part for part in parts)}
    if asked[0].weight is not None:
        _mix(splits["train"], [part["train"] for part in parts], [source.weight for source in asked], seed)
    return splits


def identify(data: str | list[str], columns: str | None = None, whole: bool = True, split: str | None = None) -> list[dict[str, File]]:
    """The files of each source by split, looked at `whole` or at their start. Raises `UserError` for one that can't be trained on."""
    identified = []
    for source, found in zip(sources(data), find_all(data, whole, split), strict=True):
        if "train" not in found:
            raise UserError(f"{source.name} has no train file, such as train.jsonl: training needs one (--split train=NAME names another)")
        identified.append({split: file if isinstance(file, File) else formats.identify(file, parse_columns(columns), whole)
                           for split, file in found.items()})
    return identified


def load_split(data: str | list[str], split: str, check: Check, dev_fraction: float, seed: int, on_bad_row: str = "stop",
               columns: str | None = None, names: str | None = None) -> Rows | None:
    """The one split of `load`, without reading the others where that can be done; None if there is no such split. `names`: --split."""
    found = find_all(data, split=names)
    if split == "test" or (split == "dev" and all("dev" in files for files in found)):
        parts = [read(files[split], check, on_bad_row, columns) for files in found if split in files]
        return join(parts) if parts else None
    return load(data, check, dev_fraction, seed, on_bad_row, columns, split=names)[split]


def sources(data: str | list[str]) -> list[Source]:
    """The sources that --data names, as NAME or NAME:WEIGHT; what follows a colon and is no number is a Hub data set's config."""
    found = []
    for value in [data] if isinstance(data, str) else data:
        name, colon, end = value.rpartition(":")
        if not colon or Path(value).exists() or not re.fullmatch(r"[-+.\deE]+|(?i:nan|inf|infinity)", end, re.A):
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


def find_all(data: str | list[str], whole: bool = True, split: str | None = None) -> list[dict[str, Path | Shards | File]]:
    """`find` of each source. Raises `UserError` for a file that two of them name: its rows would be both held out and trained on."""
    found, seen = [find(source.name, whole, split) for source in sources(data)], set()
    for file in (file for files in found for file in files.values()):
        for path in paths(file) or [file.name]:
            name = path if isinstance(path, str) else str(path.resolve())
            if name in seen:
                raise UserError(f"--data names {path} twice, so that its rows could be both held out and trained on: name it once, with "
                                "more weight if it is to count more (a.jsonl:2 b.jsonl:1)")
            seen.add(name)
    return found


def paths(file: Path | Shards | File) -> list[Path]:
    """The files on disk of a split that `find` gave; none for one of the Hub."""
    return [] if isinstance(file, File) else file.paths if isinstance(file, Shards) else [file]


def find(data: str, whole: bool = True, split: str | None = None) -> dict[str, Path | Shards | File]:
    """The files of one source by split. A data set of the Hub is downloaded whole, or read from there. Raises `UserError` for none.

    `split`: the names that the source has for our splits, as --split gives them.
    """
    path = Path(data)
    if path.exists() and not path.is_dir():
        if split:
            raise UserError(f"--split {split}: {data} is one file, which has no splits; leave --split out, or name a folder")
        return {"train": path}
    if path.is_dir():
        there = _in_folder(path)[0]
        found = {ours: there[theirs] for ours, theirs in _names_of(data, there, split).items()}
        if unclear := next((ours for ours, files in found.items() if len(files) > 1), None):
            first, second, *_ = (file.paths[0].relative_to(path) if isinstance(file, Shards) else file.name for file in found[unclear])
            raise UserError(f"--data {data}: the folder holds both {first} and {second}, so which is {unclear} is unclear; move one away")
        for file in (files[0] for files in found.values() if isinstance(files[0], Shards)):
            _check_pieces(file)
        return {ours: files[0] for ours, files in found.items()}
    if _is_hub(data):
        return {ours: _hub_file(data, theirs, whole) for ours, theirs in _names_of(data, _hub(data, whole), split).items()}
    raise UserError(f"--data {data}: no such file or folder")


def not_read(data: str | list[str], whole: bool = True, split: str | None = None) -> dict[str, list[str]]:
    """What the folders and Hub data sets among the sources hold and `find` does not return: files, or splits."""
    left = {}
    for source in sources(data):
        path = Path(source.name)
        if path.is_dir():
            there, others = _in_folder(path)
            chosen = set(_names_of(source.name, there, split).values())
            files = [file for name, files in there.items() if name not in chosen for file in files]
            others += [str(one.relative_to(path)) for file in files for one in paths(file)]
            left[source.name] = sorted(others, key=_natural)
        elif _is_hub(source.name) and not path.exists():
            there = _hub(source.name, whole)
            left[source.name] = sorted(set(there) - set(_names_of(source.name, there, split).values()))
    return {name: names for name, names in left.items() if names}


def tell_not_read(left: dict[str, list[str]]) -> list[str]:
    """A sentence for each source of `not_read`."""
    return [f"{name} holds {len(names)} more {'file or split, which is' if len(names) == 1 else 'files or splits, which are'} not read: "
            + ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") for name, names in left.items()]


def parse_split(text: str | None) -> dict[str, str]:
    """`--split train=NAME,dev=NAME,test=NAME` as {ours: theirs}. Raises `UserError`."""
    pairs = [[part.strip() for part in pair.split("=")] for pair in (text or "").split(",") if text]
    if any(len(pair) != 2 or pair[0] not in SPLITS or not pair[1] for pair in pairs):
        raise UserError(f"--split {text}: write train=NAME, dev=NAME or test=NAME, with a comma between two, as in train=train_sft")
    names = dict(pairs)
    if len(names) < len(pairs) or len({*names.values()}) < len(pairs):
        raise UserError(f"--split {text}: a split is named twice; give each once")
    return names


# The files of a split in several pieces: train-00000-of-00003, train_part1, train.0001; the Hub adds a hash to some.
_SHARD = re.compile(r"(?P<name>.+?)(?:[-_.]?(?:part|shard|chunk)[-_.]?|[-_.])(?P<number>\d+)(?:[-_.]of[-_.](?P<of>\d+))?(?:-[0-9a-f]{8,})?",
                    re.A | re.I)


def _names_of(data: str, there: Iterable[str], split: str | None) -> dict[str, str]:
    """{our name: their name} of the splits that a source has, of those that are `there`. Raises `UserError`."""
    names, listed = parse_split(split), ", ".join(sorted(there)[:20]) or "none"
    for ours, theirs in names.items():
        if theirs not in there:
            raise UserError(f"--split {ours}={theirs}: {data} has no such split; those there: {listed}")
    for ours, usual in SPLITS.items():
        theirs = next((name for name in usual if name in there and name not in names.values()), None)
        if ours not in names and theirs:
            names[ours] = theirs
    if not names and Path(data).is_dir():
        raise UserError(f"--data {data}: the folder holds no train.jsonl, dev.jsonl or test.jsonl, nor such a file in another format "
                        f"(data/README.md); --split train=NAME chooses among those there: {listed}")
    if not names:
        raise UserError(f"--data {data}: the data set has no split train, dev, validation, val or test, but {listed}; choose with "
                        "--split train=NAME")
    return {ours: names[ours] for ours in SPLITS if ours in names}


def _in_folder(folder: Path) -> tuple[dict[str, list[Path | Shards]], list[str]]:
    """(what could be a split, by name; the names of the other files) of a folder. What a name has several of is unclear.

    A split is a file, files with numbers, or a folder of files. Where there is a file of the plain name, those with numbers are not its
    pieces. Hidden files count as none.
    """
    there, pieces, others = {}, {}, []
    for path in sorted(folder.iterdir(), key=lambda path: _natural(path.name)):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            within = sorted((file for file in path.iterdir() if not file.name.startswith(".")), key=lambda file: _natural(file.name))
            files = [file for file in within if file.is_file() and formats.suggested(file)]
            others += [f"{path.name}/{file.name}" + "/" * file.is_dir() for file in within if file not in files]
            if files:
                there.setdefault(path.name, []).append(Shards(_counted(path, files), files))
            continue
        if not formats.suggested(path):
            others.append(path.name)
        elif piece := _piece(path):
            pieces.setdefault(piece["name"], []).append(path)
        elif "." in _stem(path):
            others.append(path.name)
        else:
            there.setdefault(_stem(path), []).append(path)
    for name, files in pieces.items():
        if any(isinstance(file, Path) for file in there.get(name, [])):
            others += [file.name for file in files]
        else:
            there.setdefault(name, []).append(Shards(_counted(folder / name, files), files))
    return there, others


def _check_pieces(shards: Shards) -> None:
    """Raise `UserError` if, by their names, a file of a split is there twice, or not at all."""
    found = [piece for path in shards.paths if (piece := _piece(path))]
    seen = {}
    for piece in found:
        if (other := seen.setdefault((piece["name"], int(piece["number"])), piece)) is not piece:
            raise UserError(f"--data: {shards.name}: {other.string} is there more than once, in different formats; move one away")
    totals = {int(piece["of"]) for piece in found if piece["of"]}
    if totals and len(shards.paths) not in totals:
        raise UserError(f"--data: {shards.name}: by their names, there should be {max(totals)}; get the others, too, or rename them")


def _piece(path: Path) -> re.Match | None:
    return _SHARD.fullmatch(_stem(path))


def _stem(path: Path) -> str:
    return re.sub(r"(?i)\.gz$", "", path.name).rpartition(".")[0]


def _counted(path: Path, files: list[Path]) -> str:
    return f"{path} ({len(files)} file{'s' * (len(files) != 1)})"


def _natural(name: str) -> list:
    """A key that sorts part2 before part10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _is_hub(data: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^:/\\]+)?", data, re.A)) and not formats.suggested(Path(data))


def parse_columns(text: str | None) -> dict[str, str]:
    """`--columns new=old,...` as {old: new}; an old one within an object is `column.key`. Raises `UserError`."""
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


def _absent(renames: dict[str, str], columns: Iterable[str]) -> list[str]:
    """The columns to rename that are not there and have nothing in their place, as `refs` stand in the place of a target."""
    return [old for old, new in renames.items() if old not in columns and not (new == "target" and "refs" in columns)]


def _lifted(row: dict, paths: list[str]) -> dict:
    """`row` with what stands in its objects at `paths` (translation.en) as columns of these names. An object that is empty then goes."""
    for path in paths:
        name, _, key = path.partition(".")
        if path not in row and isinstance(row.get(name), dict) and key in (within := _lifted(row[name], [key] * ("." in key))):
            rest = {name: {other: value for other, value in within.items() if other != key}}
            row = {column: value for column, value in row.items() if column != name} | (rest if rest[name] else {}) | {path: within[key]}
    return row


def _rename(row: dict, renames: dict[str, str]) -> tuple[dict, str | None]:
    absent = _absent(renames, row)
    for old, new in renames.items():
        if old in absent and new not in shapes.OPTIONAL:
            return row, f"there is no column {short(old)} to rename ({shapes.columns_of(row, within=old)}); see --columns"
        if old in row and new in row and new not in renames:
            return row, f"--columns {new}={old} would overwrite the column {short(new)}; rename that one too, as in other={new}"
    return {renames.get(name, name): value for name, value in row.items()}, None


def _with_refs(renames: dict[str, str]) -> dict[str, str]:
    """`renames`, where `refs`, all right targets, go with a `target` that is renamed: of a source, they are no right targets."""
    apart = "target" not in renames or "refs" in renames or "refs" in renames.values()
    return renames if apart else {**renames, "refs": f"{renames['target']}_refs"}


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
    for part in without:
        check_no_copies(part["train"].source, part["train"].copies)
    chosen = np.zeros(size, dtype=bool)
    chosen[list(held_out(size, dev_fraction, seed))] = True
    start = 0
    for part in without:
        train = part["train"]
        taken = chosen[start: start + len(train.rows)]
        start += len(taken)
        if taken.any():
            name = f"{train.source} ({counted(int(taken.sum()), 'rows')} held out, seed {seed})"
            part["dev"] = Rows(train.rows.take(np.flatnonzero(taken)), name, train.sha256)
        train.rows = train.rows.take(np.flatnonzero(~taken))


def held_out(size: int, dev_fraction: float, seed: int) -> set[int]:
    """Which of `size` train rows (at least two) become dev: a share, at least one, and never all of them."""
    return set(random.Random(seed).sample(range(size), min(max(1, round(size * dev_fraction)), size - 1)))


def join(parts: list[Rows]) -> Rows:
    """The rows of several sources, one source after the other."""
    if len(parts) == 1:
        return Rows(parts[0].rows, parts[0].source, parts[0].sha256, parts[0].skipped, [*parts[0].notes], [*parts[0].files])
    return Rows(functools.reduce(operator.add, (part.rows for part in parts)), " + ".join(part.source for part in parts),
                hashlib.sha256("\n".join(part.sha256 for part in parts).encode()).hexdigest(),
                [f"{part.source}, {sentence}" for part in parts for sentence in part.skipped],
                [sentence for part in parts for sentence in part.notes], [file for part in parts for file in part.files])


def _mix(train: Rows, parts: list[Rows], weights: list[float], seed: int) -> None:
    """Draw `train` anew from its parts so that their shares are as their weights, and as many rows as all parts have together.

    A part that gives fewer rows than it has gives a draw without repeats. One that gives more gives each of its rows equally often,
    and a draw of its rows once more. The mixture is shuffled, so that its first N rows are mixed alike.
    """
    generator, total = random.Random(seed), len(train.rows)
    counts = drawn([(part.source, len(part.rows)) for part in parts], weights)
    indices, start = [], 0  # of the rows of all parts, one part after the other
    for part, weight, count in zip(parts, weights, counts, strict=True):
        size = len(part.rows)
        rounds, rest = divmod(count, size)
        own = range(start, start + size)
        indices += [*own] * rounds + generator.sample(own, rest)
        start += size
        repeats = counted(count - size, "is a repeat|are repeats")
        effect = f"{counted(size - count, 'row is|rows are')} left out" if count < size else repeats if count > size else "each row once"
        train.notes.append(f"{part.source} with weight {weight:g} gives {count} of the {total} train rows, {count / total:.1%}; "
                           f"it has {size}, so {effect}")
    generator.shuffle(indices)
    train.rows = train.rows.take(indices)


def drawn(parts: list[tuple[str, int]], weights: list[float]) -> list[int]:
    """How many train rows each of `parts`, (name, rows), gives by its weight. Raises `UserError` if one would give none."""
    total = sum(size for _, size in parts)
    shares = [weight / max(weights) for weight in weights]  # as the sum of very large weights is no number
    exact = [total * share / sum(shares) for share in shares]
    counts = [math.floor(share) for share in exact]
    for i in sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:  # the largest remainders
        counts[i] += 1
    for (name, size), weight, count in zip(parts, weights, counts, strict=True):
        if not size or not count:
            raise UserError(f"{name} with weight {weight:g} would give no train row: "
                            f"{'raise its weight or leave it out' if size else 'its only row is held out as dev, so give it more rows'}")
    return counts


@functools.cache
def _hub(name: str, whole: bool = True) -> dict:
    """The splits of the Hub data set NAME or NAME:CONFIG, by their own names. Asks the Hub first, as `datasets` alone would try for half
    a minute."""
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
    return loaded


@functools.cache
def _hub_file(name: str, split: str, whole: bool) -> File:
    return hub_split(_hub(name, whole)[split], f"{name} ({split})", whole)


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
