"""What a model's tokenizer and a task make of rows, for scripts/doctor.py: lengths, what is trained on, what the training would refuse.

A `part` is that script's `Part`: the `rows` of a file or split, their `numbers`, and its `name`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recipes.common import chat, data, disk, doctor, evaluation, tasks
from recipes.common.doctor import SHOWN, Finding, Split, texts, visible
from recipes.common.errors import UserError
from recipes.common.wording import counted

LEARNED = {"classify": ("label",), "tag": ("tags",)}  # columns of a row; whatever --label names is called label by then
WHOLE = 10**9   # a --max_length that shortens nothing
UNKNOWN = 0.01  # share of unknown tokens from which a tokenizer does not fit the text
GENERATION = re.compile(r"\{%-?\s*generation\b")


@dataclass
class Encoded:
    """A split as the task reads it."""

    summary: Split
    items: Sequence[dict]  # the task's rows, or of blocks of text one for each
    numbers: Sequence[int | str]
    features: object  # what is trained on: a datasets.Dataset, or None if there is nothing
    at: Sequence[int]  # which of the features an item has; -1 for one that is left out
    lengths: Sequence[int]
    unit: str = "row"  # what `numbers` count


def tokenized(splits: dict, shared, kind, model) -> tuple[object, dict[str, Encoded], list]:
    """The task, what its own `encode` makes of each split, and findings. Raises `UserError` for what stops every training."""
    items = {name: kind.rows(part.rows, shared) for name, part in splits.items()}
    train = items.get("train") or next(iter(items.values()), [])  # without train rows, the others say which labels there are
    if not train:
        raise UserError("there is no row to train on")
    task = tasks.without_data(shared, model, train)
    for note in task.report.get("notes", []):
        print(f"note: {note}")
    if task.name in ("chat", "translate") and task.peft_type == "CAUSAL_LM" and not GENERATION.search(str(task.tokenizer.chat_template)):
        print("note: the chat template does not mark the assistant's turns ({% generation %}): they are found by rendering each dialogue, "
              "and checked; --show N shows them")
    whole = kind.make(replace(shared, max_length=WHOLE), model, task.tokenizer, kind.facts(train, shared))
    encoded, findings = {}, []
    for name, part in splits.items():
        try:
            if task.name == "pretrain":
                encoded[name], more = encode_texts(name, items[name], part, task)
            else:
                encoded[name], more = encode(name, items[name], part, task, whole, shared)
            findings += more
        except UserError as error:
            findings.append(stops(name, error))
        findings += special_tokens(name, part, task)
    return task, encoded, findings


def stops(name: str, error: UserError):
    """What is to be told of a split that can't be encoded. Of the test rows, no training reads more than the columns."""
    severity, what = ("warning", "the scoring of test rows") if name == "test" else ("error", "the training")
    return Finding(severity, "stops", f"{what} would stop: {error}", [], 0, name)


def encode(name: str, items: Sequence[dict], part, task, whole, shared) -> tuple[Encoded, list]:
    """A split as `task` reads it, and findings; `whole` is the same task without a limit, which says how long the items are in full.

    Raises `UserError` if nothing of it can be encoded.
    """
    training, findings, numbers = name == "train", [], part.numbers
    turns = task.name == "classify" and any("messages" in row for row in part.rows)
    if turns:
        sizes = [len(data.labelled_turns(row, shared.label)) if "messages" in row else 1 for row in part.rows]
        numbers = [number for number, size in zip(part.numbers, sizes, strict=True) for _ in range(size)]
    try:
        features, counts = whole.encode(items, name, "skip", training)
    except UserError:
        task.encode(items, name, shared.on_bad_row, training)  # stops as well, and names the limit that is set
        raise
    for sentence in counts["sentences"]:
        print(visible(f"{name}: {sentence}"))
    if refused := counts["refused"]:
        sentences = {number: sentence.partition(": ")[2] for number, sentence in refused.items()}  # they name the item, not the file's row
        for number in list(sentences)[:SHOWN]:
            print(visible(f"{name}, row {numbers[number - 1]}: {sentences[number]}"))
        stopping = shared.on_bad_row == "stop" and name != "test"
        findings.append(Finding("error" if stopping else "warning", "refused-row", (
            f"{len(refused)} of {len(items)} {counts['unit']} in {name} can't be trained on with this model or these labels"),
            list(dict.fromkeys(numbers[number - 1] for number in refused)), len(refused), name))
    if gone := {*refused, *counts["left_out"]}:
        stay = [i for i in range(len(items)) if i + 1 not in gone]
        items, numbers = items.take(stay), [numbers[i] for i in stay]
    measures = measured(features, task)
    at, lengths = np.arange(len(items)), measures["length"]
    if lengths.max() > task.max_length:
        try:
            features, cut = task.encode(items, name, "skip", training)
            left_out = [number - 1 for number in cut["left_out"]]
            at = np.full(len(items), -1)
            at[np.delete(np.arange(len(items)), left_out)] = np.arange(len(features))
        except UserError as error:
            features, at = None, np.full(len(items), -1)
            findings.append(stops(name, error))
        measures = measured(features, task)
    supervised = [measures["trained"][i] if i >= 0 else 0 for i in at]
    split = Split(items, numbers, lengths.tolist(), supervised, kept=(at >= 0).tolist(), unit=counts["unit"], trained=counts["items"],
                  learned=LEARNED.get(task.name, ()))
    if turns:  # what is compared and searched is the dialogue
        left = set(numbers)
        rows = [i for i, number in enumerate(part.numbers) if number in left]
        split = replace(split, rows=part.rows.take(rows), numbers=[part.numbers[i] for i in rows], items=items, item_numbers=numbers,
                        unit="labelled turns")
    flaws = {code: [numbers[i] for i in np.flatnonzero(at >= 0) if measures[code][at[i]]] for code in ("no-end", "double-bos")}
    found = [numbers[i] for i in np.flatnonzero(at >= 0) if measures["unknown"][at[i]]]
    findings += flawed(name, flaws) + unknown(name, found, sum(measures["unknown"]), sum(measures["read"]))
    return Encoded(split, items, numbers, features, at, lengths), findings


def encode_texts(name: str, items: Sequence[dict], part, task) -> tuple[Encoded, list]:
    """`encode` for pretrain, which shortens nothing: it joins texts or cuts them. Raises `UserError`."""
    features, counts = task.encode(items, name, "skip", name == "train")
    made, *others = counts["sentences"]
    for sentence in others:
        print(visible(f"{name}: {sentence}"))
    causal = task.peft_type == "CAUSAL_LM"
    around = len(task.tokenizer("")["input_ids"]) if not causal else 1  # the tokens around a text, or the one that ends it
    lengths, strange, missing = [], [], unk_of(task.tokenizer)
    for start in range(0, len(items), disk.CHUNK):
        texts = [item["text"] for item in items[start:start + disk.CHUNK]]
        for ids in task.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            lengths.append(len(ids) + around)
            strange.append(ids.count(missing))
    disk.forget()
    gone = {number - 1 for number in counts["left_out"]}
    kept = [i not in gone for i in range(len(items))]
    supervised = [length if stays else 0 for length, stays in zip(lengths, kept, strict=True)]
    split = Split(part.rows, part.numbers, lengths, supervised, kept=kept, unit=counts["unit"], trained=counts["items"], learned=(),
                  joined=made, total=counts["supervised"])
    found = [number for number, n in zip(part.numbers, strange, strict=True) if n]
    blocks = range(1, len(features) + 1)
    sizes = [len(ids) for batch in features.data.table.to_batches() for ids in arrays(batch["input_ids"])]
    return (Encoded(split, features, blocks, features, range(len(features)), sizes, "block"),
            unknown(name, found, sum(strange), sum(lengths)))


def measured(features, task) -> dict[str, Sequence]:
    """Of each feature: its `length` and how many of its tokens, words or labels are `trained` on (None for one that is out of scope); how
    many tokens it has `read` and how many of them are `unknown`; whether it has a flaw of doctor.flaws."""
    found = {name: [] for name in ("length", "trained", "read", "unknown", "no-end", "double-bos")}
    end, bos, missing = None, task.tokenizer.bos_token_id, unk_of(task.tokenizer)
    if task.peft_type == "CAUSAL_LM":
        end = chat.end_of_turn_id(task.tokenizer)
    for batch_number, batch in enumerate(features.data.table.to_batches() if features else ()):
        for ids, labels in zip(arrays(batch["input_ids"]), arrays(batch["labels"]), strict=True):
            there, flaws = np.atleast_1d(labels) != chat.IGNORE, ()
            if task.peft_type == "CAUSAL_LM":
                there, flaws = there[1:], doctor.flaws(ids, labels, end, bos)  # the first predicts nothing
            found["length"].append(max(len(ids), len(labels) if task.peft_type == "SEQ_2_SEQ_LM" else 0))
            found["trained"].append((1 if there.all() else None) if task.peft_type == "SEQ_CLS" else int(there.sum()))
            found["read"].append(len(ids))
            found["unknown"].append(int((ids == missing).sum()) if missing is not None else 0)
            for code in ("no-end", "double-bos"):
                found[code].append(code in flaws)
        if batch_number % disk.FORGET == 0:
            disk.forget()
    return found | {"length": np.array(found["length"])}


def arrays(column) -> Iterator[np.ndarray]:
    """The value of each row of an Arrow column: a list as an array, a number as it is."""
    if not hasattr(column, "offsets"):
        return iter(column.to_numpy())
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    return (values[start:end] for start, end in zip(offsets, offsets[1:], strict=False))


def unk_of(tokenizer) -> int | None:
    """The token that stands for what the tokenizer does not know, if it has one of its own: GPT-2 names the end of a text."""
    return tokenizer.unk_token_id if tokenizer.unk_token != tokenizer.eos_token else None


def flawed(name: str, rows: dict[str, list]) -> list:
    """Findings about the tokens of dialogues: turns that do not end, a first token that stands twice."""
    sentences = {"no-end": [f"{hold} an answer whose end is not trained on" for hold in ("holds", "hold")],
                 "double-bos": [f"{begin} with the first token twice" for begin in ("begins", "begin")]}
    return [Finding("warning", code, f"{counted(len(found), 'rows')} in {name} {sentences[code][len(found) > 1]}", found, len(found), name)
            for code, found in rows.items() if found]


def special_tokens(name: str, part, task) -> list:
    """Findings about texts that hold a token by which the model knows where a turn or text ends."""
    special, there, rows = [token.content for token in task.tokenizer.added_tokens_decoder.values() if token.special], Counter(), []
    for number, row in zip(part.numbers, part.rows, strict=True):
        text = "\n".join(texts(row))
        if held := [token for token in special if token in text]:
            rows.append(number)
            there.update(held)
    sentence = f"{counted(len(rows), 'rows')} in {name} with a special token of the model in the text ({', '.join(there)})"
    return [Finding("warning", "special-token", sentence, rows, len(rows), name)] if rows else []


def unknown(name: str, rows: list, strange: int, tokens: int) -> list:
    """A finding about tokens that stand for what the tokenizer does not know, if they are not few: the `rows` that have any."""
    share, rows = strange / max(1, tokens), list(dict.fromkeys(rows))
    return [Finding("warning", "unknown-token", (
        f"{share:.0%} of the tokens in {name} stand for characters that the tokenizer does not know"), rows, len(rows), name)
    ] if share >= UNKNOWN else []


def show(name: str, encoded: Encoded, task, options) -> None:
    """Print some items of a split as the model reads them, evenly from the first to the last."""
    for i in evaluation.spread(len(encoded.items), options.show):
        feature = encoded.features[int(encoded.at[i])] if encoded.at[i] >= 0 else None
        length = encoded.lengths[i]
        fate = ": left out" if feature is None else f", shortened to {len(feature['input_ids'])}" if length > task.max_length else ""
        print(f"\n--- {name}, {encoded.unit} {encoded.numbers[i]} ({length} tokens{fate}) ---")
        if feature is None:
            continue
        ids, labels = feature["input_ids"], feature.get("labels")
        if labels is None:  # words that are drawn anew in each epoch
            shown = visible(task.tokenizer.decode(ids))
        elif task.peft_type in ("CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION"):
            shown = doctor.rendered(task.tokenizer, ids, labels, options.colour, visible).rstrip("\n")
        else:
            shown = visible(task.tokenizer.decode(ids))
        print(shown)
        if task.peft_type == "TOKEN_CLS":
            print(f"-> {visible(tasks.module('tag').shown(encoded.items[i]['tokens'], encoded.items[i]['tags']))}")
        if task.peft_type == "SEQ_2_SEQ_LM":
            print(f"-> {doctor.rendered(task.tokenizer, labels, labels, options.colour, visible)}")
        if task.peft_type == "SEQ_CLS":
            print(f"-> {doctor.marked(visible(json.dumps(encoded.items[i]['label'], ensure_ascii=False)), options.colour)}")
