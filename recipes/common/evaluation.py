"""The scores of one or several models on the same rows, in one form for all tasks: on the screen, in run.json and in the report."""

import math

LANGUAGES = ("en", "zh", "all")


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


def spread(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` items out of `count`, evenly from the first to the last."""
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(min(wanted, count))]


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


def print_samples(evaluation: dict) -> None:
    """Some answers beside the right ones."""
    for sample in evaluation["samples"]:
        width = max(len(who) for who, _ in sample)
        print("\n" + "\n".join(f"  {who:>{width}} | {text}" for who, text in sample))
