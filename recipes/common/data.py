"""Files -> rows that keep the column contract (data/README.md). Every complaint names the file, the row and the remedy.

A row is a dict as it stands in the file; nothing is dropped or changed. What a row must look like is the task's business: it hands
in `check`, a function from a row to a sentence on what is wrong with it, or None.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from recipes.common.errors import UserError

# First match wins. "validation" and "val" are what other tools write.
SPLITS = {"train": ("train",), "dev": ("dev", "validation", "val"), "test": ("test",)}
ROLES = ("system", "user", "assistant", "tool")

Check = Callable[[dict], str | None]


@dataclass
class Rows:
    """The rows of one split and where they came from."""

    rows: list[dict]
    source: str
    sha256: str
    skipped: list[str] = field(default_factory=list)  # one sentence for each row left out by on_bad_row="skip"


def read(path: Path, check: Check, on_bad_row: str = "stop") -> Rows:
    """Read a JSON Lines file (UTF-8, one object a line; blank lines are allowed). Raises `UserError`."""
    rows, skipped = [], []
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, row {line}: not UTF-8 (byte {raw[error.start]:#04x}); save the file as UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): it also splits inside a string, at U+2028
        if not line.strip():
            continue
        row, wrong = _parse(line)
        wrong = wrong or check(row)
        if wrong is None:
            rows.append(row)
        elif on_bad_row == "skip":
            skipped.append(f"row {number}: {wrong}")
        else:
            raise UserError(f"{path}, row {number}: {wrong} (--on_bad_row skip leaves such rows out and lists them)")
    if not rows:
        raise UserError(f"{path} holds no {'usable ' if skipped else ''}row: expected one JSON object a line, see data/README.md")
    return Rows(rows, str(path), hashlib.sha256(raw).hexdigest(), skipped)


def load(data: str, check: Check, dev_fraction: float, seed: int, on_bad_row: str = "stop") -> dict[str, Rows]:
    """Read `data`, a .jsonl file (train) or a folder of train/dev/test.jsonl, into {"train": ..., "dev": ..., maybe "test": ...}.

    Without a dev file, a share `dev_fraction` of the train rows, drawn with `seed`, becomes dev. A row is a whole dialogue, so no
    dialogue ever stands on both sides.
    """
    files = find(data)
    if "train" not in files:
        raise UserError(f"{data} has no train.jsonl: training needs one")
    splits = {name: read(path, check, on_bad_row) for name, path in files.items()}
    if "dev" not in splits:
        train = splits["train"]
        if len(train.rows) < 2:
            raise UserError(f"{train.source} has one row: training needs at least two, as one is held out as dev")
        held_out = min(max(1, round(len(train.rows) * dev_fraction)), len(train.rows) - 1)
        chosen = set(random.Random(seed).sample(range(len(train.rows)), held_out))
        source = f"{train.source} ({held_out} rows held out, seed {seed})"
        splits["dev"] = Rows([r for i, r in enumerate(train.rows) if i in chosen], source, train.sha256)
        train.rows = [r for i, r in enumerate(train.rows) if i not in chosen]
    return splits


def find(data: str) -> dict[str, Path]:
    """The files of `data` by split. Raises `UserError` when there is none."""
    path = Path(data)
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise UserError(f"--data {data}: no such file or folder")
    found = {split: next((path / f"{name}.jsonl" for name in names if (path / f"{name}.jsonl").is_file()), None)
             for split, names in SPLITS.items()}
    if not any(found.values()):
        raise UserError(f"--data {data}: the folder holds no train.jsonl, dev.jsonl or test.jsonl")
    return {split: file for split, file in found.items() if file}


def check_dialogue(row: dict) -> str | None:
    """What is wrong with a row of the chat task, in one sentence; None if nothing is."""
    if "messages" not in row:
        names = ", ".join(row) or "none"
        return f'no column "messages" (columns: {names}); a dialogue is {{"messages": [{{"role": "user", "content": "..."}}, ...]}}'
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return '"messages" must be a list of turns that is not empty'
    for i, turn in enumerate(messages, start=1):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            return f'turn {i} must be an object with "role" and "content", not {_short(turn)}'
        if turn["role"] not in ROLES:
            return f"turn {i}: role {_short(turn['role'])} is unknown; use one of {', '.join(ROLES)}"
        if not isinstance(turn["content"], str):
            return f"turn {i}: content must be a string, not {_short(turn['content'])}"
        if any("\ud800" <= character <= "\udfff" for character in turn["content"]):
            return f"turn {i}: content holds half a character (a lone surrogate, {_short(turn['content'])}); write the whole one"
        if not turn["content"].strip():
            return f"turn {i} ({turn['role']}) is empty; remove it or give it text"
        if turn["role"] == "system" and i > 1:
            return f"turn {i}: a system turn may only come first"
        if not isinstance(turn.get("train", True), bool):
            return f'turn {i}: "train" must be true or false, not {_short(turn["train"])}'
    if not any(turn["role"] == "assistant" for turn in messages):
        return "no assistant turn, so there is nothing to learn; a dialogue needs at least one"
    if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in messages):
        return 'every assistant turn has "train": false, so there is nothing to learn'
    return None


def check_classify(row: dict, label: str = "label", multi_label: bool = False) -> str | None:
    """What is wrong with a row of the classify task, in one sentence; None if nothing is. A dialogue needs a turn with the key `label`."""
    if "messages" in row:
        wrong = check_dialogue(row)
        if wrong is None and not any(label in turn for turn in row["messages"]):
            wrong = f'no turn has the key "{label}", so there is nothing to learn; --label names another key'
        return wrong
    for column in ("text", label):
        if column not in row:
            return f'no column "{column}" (columns: {", ".join(row) or "none"}); a row is {{"text": "...", "{label}": "..."}}'
    for column in ("text", "text_pair"):
        value = row.get(column)
        if column == "text" and (not isinstance(value, str) or not value.strip()) or value is not None and not isinstance(value, str):
            return f'"{column}" must be a string with visible text, not {_short(value)}'
    values = row[label] if multi_label else [row[label]]
    if not isinstance(values, list):
        return f'"{label}" must be a list of labels, as --multi_label says, not {_short(values)}'
    wrong = next((v for v in values if isinstance(v, bool) or not isinstance(v, str | int) or v == ""), None)
    if wrong is not None:
        return f'"{label}" must be a string or a whole number, not {_short(wrong)}'
    return None


def check_tag(row: dict) -> str | None:
    """What is wrong with a row of the tag task, in one sentence; None if nothing is. Tags are O, B-type or I-type (IOB2)."""
    for column in ("tokens", "tags"):
        if column not in row:
            return (f'no column "{column}" (columns: {", ".join(row) or "none"}); a row is {{"tokens": ["to", "Paris"], '
                    '"tags": ["O", "B-city"]}')
        if not isinstance(row[column], list) or not row[column]:
            return f'"{column}" must be a list of strings that is not empty, not {_short(row[column])}'
        for i, entry in enumerate(row[column], start=1):
            if not isinstance(entry, str) or not entry.strip():
                return f'"{column}", entry {i} must be a string with visible text, not {_short(entry)}'
    if len(row["tokens"]) != len(row["tags"]):
        return f"{len(row['tokens'])} tokens but {len(row['tags'])} tags: each token needs one"
    wrong = next((tag for tag in row["tags"] if tag != "O" and (tag[:2] not in ("B-", "I-") or len(tag) == 2)), None)
    return None if wrong is None else f"tag {_short(wrong)} is not IOB2: write O, or B-type for a span's first word and I-type for the rest"


def _parse(line: str) -> tuple[dict, str | None]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"broken JSON at column {error.colno} ({error.msg}): {_short(line)}"
    except RecursionError:
        return {}, f"JSON nested too deeply: {_short(line)}"
    except ValueError as error:  # a number of more than 4,300 digits
        return {}, f"JSON that can't be read ({error}): {_short(line)}"
    return (row, None) if isinstance(row, dict) else ({}, f"expected a JSON object, not {_short(row)}")


def _short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= 60 else text[:57] + "...")
