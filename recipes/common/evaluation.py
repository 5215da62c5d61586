"""The scores of one or several models on the same rows, in one form for all tasks: on the screen, in run.json and in the report."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

LANGUAGES = ("en", "zh", "all")
REPORTED = 20  # answers that the report shows beside each other
# Columns of the tasks' predictions: in a line, a model's answer stands under its name beside them.
COLUMNS = {"id", "row", "turn", "language", "context", "text", "text_pair", "label", "right", "source", "reference", "references", "tokens",
           "tags"}


class Candidate(NamedTuple):
    """A model that is to be scored."""

    load: Callable  # gives the model, so that one at a time is in memory
    task: object  # tasks.Task: how this model reads rows
    threshold: float | None = None  # below which probability of the likeliest label a row is turned away
    dev: list | None = None  # rows to set that threshold by


def encoded(candidates: dict[str, Candidate], rows, on_bad_row: str, **options) -> dict[str, tuple]:
    """(features, counts) of the rows for each candidate, as its task encodes them; those of one task only once."""
    made = {}
    for candidate in candidates.values():
        if id(candidate.task) not in made:
            made[id(candidate.task)] = candidate.task.encode(rows, "rows", on_bad_row, **options)
    return {name: made[id(candidate.task)] for name, candidate in candidates.items()}


def sentences(read: dict[str, tuple]) -> list[str]:
    """What became of the rows, from `encoded`; with the model's name where not all read them alike."""
    every = {name: counts["sentences"] for name, (_, counts) in read.items() if "sentences" in counts}
    first = next(iter(every.values()), [])
    if all(own == first for own in every.values()):
        return first
    return [f"{name}: {sentence}" for name, own in every.items() for sentence in own]


def result(columns, scored: list[dict], unit: str, rows: int, *, notes: list[str], samples: list, predictions: list[dict],
           losses: dict, signature: str, **more) -> dict:
    """What a task's `evaluate` returns, ready for JSON.

    `columns` are headings; `scored` has a row for each language and model: "language", "model", "count" (of `unit`) and "values", one
    for each column. `rows` is the number of rows scored. A sample is a list of (who, text); a prediction is a line of
    predictions-SPLIT.jsonl, with the number of its "row" from 0. `losses` is model -> row -> [summed negative log-likelihood in nats, its
    number of items], for each row that could be scored. `more` is what only this task has (a classification report).
    """
    return {"rows": rows, "unit": unit, "columns": list(columns), "table": sorted(scored, key=lambda row: LANGUAGES.index(row["language"])),
            "notes": notes, "signature": signature, "samples": samples, "predictions": predictions, "losses": losses, **more}


def beside_columns(name: str) -> str:
    """`name`, or one that overwrites no column of the predictions, as "label-run"."""
    return f"{name}-run" if name in COLUMNS else name


def predictions(text: str) -> list[dict]:
    """The lines of a predictions-SPLIT.jsonl. A reply may hold a line separator (U+2028), at which str.splitlines would cut it."""
    return [json.loads(line) for line in text.split("\n") if line]


def file_name(name: str) -> str:
    """`name`, or where it would be too long to be part of a file's name, its beginning and a hash of it. Disks count bytes: a Chinese
    character has three."""
    whole = name.encode()
    return name if len(whole) <= 100 else f"{whole[:80].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"


def own_name(record: dict) -> str:
    """The name of a run's model in its own evaluation, from its run.json."""
    return beside_columns(record["recipe"])


def base_name(record: dict) -> str:
    """The name of the model that a run started from in its evaluation, from its run.json."""
    return "start (drawn at random)" if record["shared_arguments"].get("from_scratch") else f"{record['model']['used']} (untuned)"


def slices(keys: list[dict[str, str]], columns, scorers: dict) -> dict:
    """The scores of parts of the rows: for each key (intent, language) a line for each of its values and each model.

    `keys` has, for each item that is scored, its value of each key it has. `scorers` is name of a model -> a function from positions of
    items to the values of `columns`. A key with the same value everywhere cuts nothing, and is left out.
    """
    parts = defaultdict(lambda: defaultdict(list))
    for i, own in enumerate(keys):
        for key, value in own.items():
            parts[key][str(value)].append(i)
    table = [{"by": key, "value": value, "model": name, "count": len(at), "values": list(score(at))}
             for key, values in parts.items() if len(values) > 1
             for value, at in sorted(values.items(), key=lambda item: _natural(item[0])) for name, score in scorers.items()]
    return {"columns": list(columns), "table": table}


def _natural(value: str) -> tuple:
    """A sort key that puts 11-20 after 2."""
    digits = value[: len(value) - len(value.lstrip("0123456789"))]
    return (int(digits) if digits else -1, value)


def print_slices(evaluation: dict) -> None:
    """The scores of the parts, a block for each way to cut."""
    found = evaluation["slices"]
    width = max([len(row["value"]) + len(row["model"]) for row in found["table"]], default=0) + 2
    by = None
    for row in found["table"]:
        if row["by"] != by:
            by = row["by"]
            print(f"\n{'by ' + by.replace('_', ' '):<{width}} {evaluation['unit']:>8} "
                  + " ".join(f"{name:>10}" for name in found["columns"]))
        name = f"{row['value']}  {row['model']}"
        print(f"{name:<{width}} {row['count']:>8} " + " ".join(f"{_shown(value):>10}" for value in row["values"]))


def spread(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` items out of `count`, evenly from the first to the last; all of them if there are fewer."""
    wanted = min(count, wanted)
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]


def reported(count: int, options) -> list[int]:
    """Indices of the items, out of `count`, that a result shows: at least those of the report."""
    return spread(count, max(REPORTED, options.samples))


def print_table(evaluation: dict) -> None:
    """The scores, a line for each language and model."""
    width = max(len(row["model"]) for row in evaluation["table"])
    count = max(len(evaluation["unit"]), 7)
    print(f"\n{'':<4} {'':<{width}} {evaluation['unit']:>{count}} " + " ".join(f"{name:>10}" for name in evaluation["columns"]))
    previous = None
    for row in evaluation["table"]:
        language = "" if row["language"] == previous else row["language"]
        previous = row["language"]
        values = " ".join(f"{_shown(value):>10}" for value in row["values"])
        print(f"{language:<4} {row['model']:<{width}} {row['count']:>{count}} {values}")
    for note in evaluation["notes"]:
        print(f"note: {note}")
    print(f"({evaluation['signature']})")


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def print_samples(evaluation: dict, wanted: int) -> None:
    """`wanted` answers beside the right ones."""
    for i in spread(len(evaluation["samples"]), wanted):
        sample = evaluation["samples"][i]
        width = max(len(who) for who, _ in sample)
        below = f"\n  {'':>{width}} | "
        print("\n" + "\n".join(f"  {who:>{width}} | {text.replace(chr(10), below)}" for who, text in sample))
