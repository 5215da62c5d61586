"""What is learned: a task is a record of its rows, how they become features, and how a batch of them is scored.

A task never sees the method, and a method only sees the task's PEFT type, so any method goes with any task.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from recipes.common import chat, data, models
from recipes.common.errors import UserError


@dataclass
class Task:
    """A task, loaded: what the recipe's `main` hands to the method and to the Trainer."""

    name: str
    peft_type: str  # peft.TaskType
    source: models.Source
    tokenizer: object
    train: Dataset  # columns input_ids, labels (chat.IGNORE: no loss)
    dev: Dataset
    max_length: int  # tokens of the longest row
    window: int | None  # tokens the model can read, if it says so
    report: dict  # what was read, shortened and left out: goes into run.json
    load_model: Callable[[], object]

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Pad to the longest row: input_ids, attention_mask and labels, each (batch, length), padded on the right."""
        return chat.pad(rows, self.tokenizer.pad_token_id)


def load(shared, training) -> Task:
    """Read and tokenize the rows of `shared.task` for the model `shared.model`; prints what was read. Raises `UserError`."""
    splits = data.load(shared.data, data.check_dialogue, shared.dev_fraction, training.seed, shared.on_bad_row, shared.columns)
    source = models.resolve(shared.model, shared.fallback_model)
    tokenizer = models.load_tokenizer(source)
    note = chat.prepare(tokenizer)
    window = models.window(source)
    if window and shared.max_length > window:
        raise UserError(f"--max_length {shared.max_length} exceeds the {window} tokens that {source.used} can read: lower it")
    systems = Counter(row["messages"][0]["content"] for row in splits["train"].rows if row["messages"][0]["role"] == "system")
    report = {"template_note": note, "max_length": shared.max_length, "system": systems.most_common(1)[0][0] if systems else None,
              "splits": {}}
    features = {}
    for split, limit in (("train", shared.max_train_samples), ("dev", shared.max_eval_samples)):
        rows = splits[split].rows[:limit]
        features[split], counts = encode_dialogues(rows, tokenizer, shared.max_length, splits[split].source,
                                                   shared.on_bad_row)
        refused = counts.pop("refused")
        report["splits"][split] = {"source": splits[split].source, "sha256": splits[split].sha256, **counts,
                                   "bad_rows": splits[split].skipped + refused, "notes": splits[split].notes}
    if training.process_index == 0:
        print_report(source, report)
    return Task("chat", "CAUSAL_LM", source, tokenizer, features["train"], features["dev"], shared.max_length, window, report,
                lambda: models.load(source, tokenizer))


def encode_dialogues(rows: list[dict], tokenizer, max_length: int, name: str, on_bad_row: str = "stop") -> tuple[Dataset, dict]:
    """Tokenize dialogues into columns input_ids, labels; counts what was shortened or left out. Raises `UserError`.

    Dialogues that the model's chat template refuses (no system turn, strict alternation) are bad rows, for this model.
    """
    features, counts, left_out, refused = [], Counter(), [], []
    for number, row in enumerate(tqdm(rows, desc=f"Tokenizing {Path(name).name}", unit="rows", leave=False), start=1):
        try:
            encoded = chat.encode(row["messages"], tokenizer, max_length)
        except chat.TemplateError as error:
            if on_bad_row == "stop":
                raise UserError(f"{name}, dialogue {number}: {error} (--on_bad_row skip leaves such dialogues out)") from error
            refused.append(f"dialogue {number}: {error}")
            continue
        if encoded is None:
            left_out.append(number)
            continue
        features.append({"input_ids": encoded.input_ids, "labels": encoded.labels})
        counts["shortened"] += encoded.dropped_turns > 0
        counts["turns_dropped"] += encoded.dropped_turns
        counts["tokens"] += len(encoded.input_ids)
        counts["supervised_tokens"] += sum(label != chat.IGNORE for label in encoded.labels[1:])  # the first predicts nothing
    if not features:
        raise UserError(f"{name}: no dialogue has a supervised token within --max_length {max_length}; raise --max_length")
    summary = {"rows": len(rows), "kept": len(features), "left_out": left_out, "refused": refused,
               **{key: counts[key] for key in ("shortened", "turns_dropped", "tokens", "supervised_tokens")}}
    return Dataset.from_list(features), summary


def print_report(source: models.Source, report: dict) -> None:
    """The run's first lines on the screen: the model, and what became of the rows."""
    print(f"model: {source.used}" + (f" (asked for: {source.requested})" if source.used != source.requested else ""))
    if report["template_note"]:
        print(f"note: {report['template_note']}")
    for split, c in report["splits"].items():
        print(f"{split}: {c['kept']} of {c['rows']} dialogues, {c['tokens']:,} tokens, {c['supervised_tokens']:,} of them trained on"
              f" ({c['source']})")
        if c["shortened"]:
            print(f"  {c['shortened']} dialogues exceed --max_length {report['max_length']}: "
                  f"{c['turns_dropped']} oldest turns dropped")
        if c["left_out"]:
            print(f"  left out, as even the last question with its answer exceeds --max_length or no turn is trained on: "
                  f"{len(c['left_out'])} dialogues (numbers {_some(c['left_out'])})")
        for sentence in c["notes"]:
            print(f"  note: {sentence}")
        for sentence in c["bad_rows"][:5]:
            print(f"  skipped {sentence}")
        if len(c["bad_rows"]) > 5:
            print(f"  ... {len(c['bad_rows'])} rows skipped in all; run.json lists them")


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
