"""Texts and their labels: one of several (an intent, a sentiment), any number (`--multi_label`), or none of them (`--oos_label`).

Rows are {"text", "label"} with an optional "text_pair", or dialogues: then each turn that carries the key `--label` is a row of its own,
read alone or with the `--context_turns` turns before it.
"""

import itertools
import math
import shlex
from bisect import bisect_left
from collections import Counter
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from recipes.common import data, disk, encoding, evaluation, losses, metrics, models
from recipes.common.chat import IGNORE
from recipes.common.errors import UserError
from recipes.common.head_start import start_from_prototypes
from recipes.common.scoring import dataset_outputs, mean_loss
from recipes.common.tasks import Task, flags
from recipes.common.wording import counted

MAX_LENGTH = 256
UNIT = "rows"
MODELS = dict.fromkeys(models.KINDS, AutoModelForSequenceClassification)
UNTUNED_SCORES = False  # a pretrained model has no head for these labels
SLICED_BY = ("intent", "sentiment")  # annotation of a row or turn by which its scores are cut up
TURNED_AWAY = 0.05  # share of the dev rows that a threshold may turn away wrongly, where dev has no out-of-scope rows to set it by


def check(shared):
    """A row is a text with its label, or a dialogue with such turns."""
    return partial(data.check_classify, label=shared.label, multi_label=shared.multi_label)


def rows(rows, shared) -> disk.Stored:
    """{"text", "text_pair", "label", ...} of each row, and of each labelled turn of a dialogue."""
    return disk.expanded(rows, partial(_texts, shared=shared, numbers=itertools.count()))


def _texts(row: dict, shared, numbers):
    number = next(numbers)  # of the row, from 0; turns of one dialogue share it
    if "messages" not in row:
        yield {**row, "label": row[shared.label]}
        return
    for i, turn in data.labelled_turns(row, shared.label):
        before = row["messages"][max(0, i - shared.context_turns): i]
        context = "\n".join(f"{m['role']}: {m['content']}" for m in before if m["role"] != "system")
        yield ({"id": f"{row.get('id', number)}#{i + 1}", "text": turn["content"], "text_pair": context or None, "of_dialogue": True,
                "label": turn[shared.label], "turn": 1 + sum(m["role"] == turn["role"] for m in row["messages"][:i])}
               | {key: row[key] for key in ("language",) if key in row}
               | {key: turn[key] for key in SLICED_BY if key in turn and key != shared.label})


def facts(rows, shared) -> dict:
    """The labels of the train rows and how often each occurs. Raises `UserError` for fewer than two."""
    counts = _counts(rows, shared)
    if len(counts) < 2:
        raise UserError(f"the train rows hold {'one label' if counts else 'no label'} in \"{shared.label}\" ({', '.join(counts)}): "
                        "there must be at least two to tell apart")
    return {"labels": dict(sorted(counts.items()))}


def _counts(rows, shared) -> Counter:
    counts = Counter(str(label) for row in rows for label in (row["label"] if shared.multi_label else [row["label"]]))
    counts.pop(shared.oos_label, None)
    return counts


def make(shared, source, tokenizer, facts) -> Task:
    """The task for this model. An encoder-decoder reads the text with both its stacks; its head reads where the text ends."""
    names = list(facts["labels"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    kind, own = models.kind(source), {}  # own: what the model's config says besides the labels
    if kind == "encoder":
        own = {"classifier_pooling": models.pooling(source) if shared.pooling == "auto" else shared.pooling}
    elif shared.pooling != "auto":
        raise UserError(f"--pooling is for encoders; {source.used} is {models.KINDS[kind]}, which decides at its end: leave it out")
    if kind == "encoder-decoder":
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {source.used} has no token that ends a text: use another encoder-decoder")
        own = {"use_cache": False}  # nothing is written after it
    problem = "multi_label_classification" if shared.multi_label else "single_label_classification"
    return Task("classify", "SEQ_CLS", AutoModelForSequenceClassification, source, tokenizer, shared.max_length,
                encode=partial(encode, tokenizer=tokenizer, shared=shared, labels=facts["labels"], ended=kind == "encoder-decoder"),
                collate=partial(collate, tokenizer=tokenizer), loss=losses.rows, outputs=lambda parts: (parts[0].logits.float(),),
                metrics=partial(dev_metrics, shared=shared), per_token=False,
                config={"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}, "problem_type": problem,
                        **own},
                start_head=start_from_prototypes if shared.head_start == "prototypes" and not shared.multi_label else None,
                head="classification_head" if kind == "encoder-decoder" else None)


def encode(rows, name: str, on_bad_row: str = "stop", training: bool = False, *, tokenizer, shared,
           labels: dict[str, int], ended: bool = False, outside_alone: bool = False) -> tuple[Dataset, dict]:
    """Tokenize rows into columns input_ids, (token_type_ids,) labels and, for `training` with balanced classes, weights. `ended`: for a
    model that reads one text and decides at the token that ends it. `outside_alone`: rows that are all out of scope will do, as no loss is
    needed.

    A label that the train rows don't have is a bad row. Out-of-scope rows get the label IGNORE, and are left out of training. Where a
    row has more than `shared.max_length` tokens, its context loses its beginning, up to all of it; a text that is too long alone, or a pair
    that is no context, loses its end. Raises `UserError`.
    """
    # Of the rows at hand: `labels` counts those of the whole file, of which --max_train_samples may leave a part.
    own = _counts(rows, shared) if training else {}
    mean = sum(own.values()) / max(len(own), 1)
    balanced = training and shared.class_weights == "balanced"
    one = partial(_encode, tokenizer=tokenizer, shared=shared, index={label: i for i, label in enumerate(labels)}, training=training,
                  ended=ended, weights={label: mean / n for label, n in own.items()} if balanced else None)
    features, counts, left_out, refused = encoding.encode(rows, name, one, "row", on_bad_row, shared.preprocessing_num_workers)
    if features is None:
        raise UserError(f"{name}: no row is left to {'train on' if training else 'score'}")
    if not counts["supervised"] and not outside_alone:
        raise UserError(f"{name}: all rows are out of scope (--oos_label {shared.oos_label}), so there is no loss to measure: add rows "
                        "with labels of the train rows")
    sentences = _sentences(counts, len(features), len(left_out), tokenizer, shared)
    if training:
        sentences = [*_alike([*labels, shared.oos_label or ""]), *sentences, *([] if shared.replay else _absent(labels, own, len(rows)))]
    else:
        sentences += _none_outside(counts, len(features), shared, dev=not outside_alone)
    return features, {
        "unit": UNIT, "rows": len(rows), "kept": len(features), "left_out": left_out, "refused": refused, "items": "labels",
        **{key: counts[key] for key in ("shortened", "tokens", "supervised")}, "sentences": sentences,
        **({"labels": dict(sorted(own.items()))} if training else {})}


def _absent(labels, own: Counter, rows: int) -> list[str]:
    """A sentence on the labels without a row among those trained on; --replay tells of them itself."""
    absent = [label for label in labels if label not in own]
    return [f"{len(absent)} of {len(labels)} labels have no row among these {rows}, so they are not trained on ({', '.join(absent[:5])}"
            f"{' ...' if absent[5:] else ''})"] if absent else []


def _none_outside(counts: Counter, kept: int, shared, dev: bool) -> list[str]:
    """A sentence on rows to be scored none of which is out of scope. Train rows need none, as they would only be left out."""
    if not shared.oos_label or counts["supervised"] < kept:
        return []
    effect = f", so the threshold will be the one that turns away {TURNED_AWAY:.0%} of the rows in scope" if dev else ""
    return [f"no row has the label {shared.oos_label!r}, which --oos_label takes as out of scope{effect}"]


def _alike(labels: list[str]) -> list[str]:
    """A sentence on each label that another one differs from only in case or in the blanks around it."""
    seen, sentences = {}, []
    for label in labels:
        first = seen.setdefault(label.strip().casefold(), label)
        if first != label:
            sentences.append(f"the labels {first!r} and {label!r} differ only in case or in blanks around them: they count as two")
    return sentences


def _sentences(counts: Counter, kept: int, left_out: int, tokenizer, shared) -> list[str]:
    """What became of the rows that were kept and of those out of scope that were left out, as far as it is not what one would expect."""
    sentences = []
    if counts["cut"]:
        sentences.append(f"{counted(counts['cut'], 'row exceeds|rows exceed')} --max_length {shared.max_length}: the end is cut off")
    if counts["context"]:
        sentences.append(f"{counted(counts['context'], 'row exceeds|rows exceed')} --max_length {shared.max_length} with the context, "
                         "which lost its beginning, or all")
    if counts["ends"]:
        sentences.append(f"{counted(counts['ends'], 'row holds|rows hold')} the token {tokenizer.eos_token}, which ends a text: it "
                         "is left out")
    if counts["unknown"]:
        sentences.append(f"{counts['unknown']:,} of {counts['tokens']:,} tokens are unknown to the tokenizer, and the same "
                         f"{tokenizer.unk_token} to the model: it goes by what stands around them")
    if counts["flat"] and shared.context_turns:
        sentences.append(f"{counts['flat']} of {kept} rows are no turns of a dialogue: --context_turns changes nothing for them")
    if 0 < counts["pairs"] < counts["flat"]:
        sentences.append(f"{counts['pairs']} of {counts['flat']} rows have a text_pair, the others are read without")
    if left_out:
        sentences.append(f"{counted(left_out, 'out-of-scope row is|out-of-scope rows are')} not trained on")
    return sentences


def _encode(row: dict, tokenizer, shared, index: dict[str, int], weights: dict[str, float] | None,
            training: bool, ended: bool) -> tuple[dict | None, dict]:
    own = [str(label) for label in (row["label"] if shared.multi_label else [row["label"]])]
    if unknown := [label for label in own if label not in index and label != shared.oos_label]:
        raise encoding.Refused(f"label {unknown[0]!r} does not occur in the train rows",
                               f"--oos_label {shlex.quote(unknown[0])} takes it as out of scope, --on_bad_row skip leaves it out")
    outside = shared.oos_label in own
    if outside and training:
        return None, {}
    feature, cut, context = _tokens(row, tokenizer, shared.max_length, ended)
    counts = {"shortened": cut or context, "cut": cut, "context": context, "supervised": not outside}
    if not row.get("of_dialogue"):
        counts |= {"flat": True, "pairs": bool(row.get("text_pair"))}
    if ended:
        counts["ends"] = feature["input_ids"].count(tokenizer.eos_token_id) > 1
        feature["input_ids"] = _end_once(feature["input_ids"], tokenizer.eos_token_id, shared.max_length)
    if shared.multi_label:
        feature["labels"] = [float(label in own) for label in index]
    else:
        feature["labels"] = IGNORE if outside else index[own[0]]
    if weights:
        feature["weights"] = weights[own[0]]
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):  # GPT-2 and OPT name their end, but know all bytes
        counts["unknown"] = feature["input_ids"].count(tokenizer.unk_token_id)
    return feature, {**counts, "tokens": len(feature["input_ids"])}


def _tokens(row: dict, tokenizer, max_length: int, ended: bool) -> tuple[dict, bool, bool]:
    """(features of a text and what goes with it, whether they lost their end, whether a context lost its beginning)."""
    text, pair = row["text"], row.get("text_pair")
    one = ended or tokenizer.sep_token is None  # a model that decides where the text ends reads one text

    def read(pair, **options):
        return tokenizer(f"{pair}\n{text}", **options) if pair and one else tokenizer(text, pair, **options)

    def fits(pair):
        return len(read(pair)["input_ids"]) <= max_length

    encoding, context = read(pair), False
    cut = len(encoding["input_ids"]) > max_length
    if cut:
        if pair and (one or row.get("of_dialogue")):  # what is next to the text stays; two texts side by side are cut alike
            pair = pair[bisect_left(range(len(pair)), True, key=lambda start: fits(pair[start:])):] or None
            cut, context = pair is None and not fits(None), True
        encoding = read(pair, truncation="longest_first", max_length=max_length)
    return {key: encoding[key] for key in ("input_ids", *(() if one else ("token_type_ids",))) if key in encoding}, cut, context


def _end_once(ids: list[int], end: int, max_length: int) -> list[int]:
    """`ids` with `end` at the end and nowhere else: the head of an encoder-decoder reads at the last one, and wants as many in each row."""
    return [token for token in ids if token != end][: max_length - 1] + [end]


def collate(features: list[dict], tokenizer) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and token_type_ids (batch, length), padded on the right; labels and weights as in losses.rows."""
    rows = [{key: feature[key] for key in ("input_ids", "token_type_ids") if key in feature} for feature in features]
    batch = dict(tokenizer.pad(rows, padding_side="right", return_tensors="pt"))
    batch["labels"] = torch.tensor([feature["labels"] for feature in features])
    if "weights" in features[0]:
        batch["weights"] = torch.tensor([feature["weights"] for feature in features])
    return batch


def dev_metrics(logits: np.ndarray, labels: np.ndarray, *, shared) -> dict[str, float]:
    """Of all dev rows: accuracy and macro F1, 0-100; with --oos_label the threshold that evaluation will use, a probability."""
    if shared.multi_label:
        return multi_label_scores(logits > 0, labels > 0)
    inside = labels != IGNORE
    scores = label_scores(logits[inside].argmax(1).tolist(), labels[inside].tolist())
    return scores | ({"oos_threshold": threshold(logits, labels)} if shared.oos_label else {})


def label_scores(predicted: list, right: list) -> dict[str, float]:
    """Accuracy and macro F1, 0-100."""
    report = metrics.classification_report(predicted, right)
    return {"accuracy": 100 * report["accuracy"], "f1_macro": 100 * report["macro avg"]["f1-score"]}


def multi_label_scores(predicted: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Of (rows, classes) of true and false: micro and macro F1 and the share of rows without any mistake, 0-100.

    100 times scikit-learn's f1_score(average=..., zero_division=0) and accuracy_score.
    """
    report = metrics.multi_label_report(predicted, right, [str(i) for i in range(right.shape[1])])
    return {"accuracy": 100 * float((predicted == right).all(1).mean()), "f1_macro": 100 * report["macro avg"]["f1-score"],
            "f1_micro": 100 * report["micro avg"]["f1-score"]}


def confidence(logits: np.ndarray) -> np.ndarray:
    """(rows,) the probability of the likeliest class (Hendrycks and Gimpel, 2017, arXiv:1610.02136)."""
    return torch.from_numpy(logits).double().softmax(1).max(1).values.numpy()


def threshold(logits: np.ndarray, labels: np.ndarray) -> float:
    """The confidence below which a row is turned away as out of scope.

    Where dev has out-of-scope rows (label IGNORE), the one with the best mean of the accuracy in scope and the recall out of scope; else
    the one that turns away TURNED_AWAY of the rows in scope. Between the confidences of two rows, where it can be.
    """
    sure, inside = confidence(logits), labels != IGNORE
    if inside.all():
        return float(np.quantile(sure, TURNED_AWAY))
    right = inside & (logits.argmax(1) == labels)
    cuts = np.unique(sure)
    gain = [(right & (sure >= cut)).sum() / max(inside.sum(), 1) + (~inside & (sure < cut)).sum() / (~inside).sum() for cut in cuts]
    best = int(np.argmax(gain))
    return float(cuts[max(best - 1, 0):best + 1].mean())  # halfway between two rows: on one of them, rounding would decide


def evaluate(candidates: dict, task: Task, rows: list[dict], record: dict, options) -> dict:
    """Accuracy and F1 of the labels, by language and in all, with a report on each label; the most frequent label beside them if asked."""
    shared, names = flags(record), list(task.config["label2id"])
    read = evaluation.encoded(candidates, rows, shared.on_bad_row, outside_alone=True)
    features, counts = next(iter(read.values()))
    for sentence in counts["refused"].values():
        print(f"skipped {sentence}")
    rows = [row for number, row in enumerate(rows, start=1) if number not in counts["refused"]]
    languages = [metrics.language_of(row, row["text"]) for row in rows]
    labels = np.array(features["labels"])
    scored, logits, losses, cuts = [], {}, {}, {}
    for name, candidate in candidates.items():
        model = candidate.load()
        cuts[name] = candidate.threshold
        if candidate.dev is not None:
            cuts[name] = _threshold_on(model, candidate, shared, f"Dev rows of {name}")
        outputs = dataset_outputs(model, candidate.task, read[name][0], f"Labels of {name}")
        sums, logits[name] = map(np.array, zip(*outputs, strict=True))
        losses[name] = dict(enumerate(sums.tolist()))
        scored += _scores(name, sums, logits[name], labels, languages, shared, cuts[name])
    if options.base:
        frequent = int(np.argmax([record["data"]["labels"][label] for label in names]))
        always = np.full((len(rows), len(names)), -np.inf)
        always[:, frequent] = 1
        scored += _scores(f"always {names[frequent]}", np.full((len(rows), 2), np.nan), always, labels, languages, shared, None)
    name, last = list(logits.items())[-1]
    right = [_right(labels[i], names, shared) for i in range(len(rows))]
    predicted = {name: [_predicted(row, names, shared, cuts[name]) for row in values] for name, values in logits.items()}
    samples = [[*_asked(rows[i]), ("label", right[i]), *((name, answers[i]) for name, answers in predicted.items())]
               for i in evaluation.reported(len(rows), options)]
    predictions = [{"id": row.get("id", i), "row": i, **dict(_asked(row)), "label": right[i],
                    **{name: p[i] for name, p in predicted.items()}} for i, row in enumerate(rows)]
    notes, more = evaluation.sentences(read), {"slices": _slices(rows, languages, logits, labels, shared)}
    cuts = {name: cut for name, cut in cuts.items() if cut is not None}
    for name, cut in cuts.items():
        how = "set on dev" if candidates[name].dev is not None or len(cuts) == 1 else "as its training set it on dev"
        notes.append(f"{f'{name}: ' if len(cuts) > 1 else ''}a row whose likeliest label has less than {_exact(cut)} probability is turned "
                     f"away as {shared.oos_label} ({how})")
    if shared.multi_label:
        more["report"] = metrics.multi_label_report(logits[name] > 0, labels > 0, names)
    else:
        more["report"] = metrics.classification_report(predicted[name], right)
        wrong = Counter((r, p) for r, p in zip(right, predicted[name], strict=True) if r != p)
        more["confusion_matrix"] = metrics.confusion_matrix(predicted[name], right)
        more["confusions"] = [[r, p, n] for (r, p), n in wrong.most_common(10)]
        notes += [f"{counted(n, 'times')} {p} in place of {r}" for (r, p), n in wrong.most_common(3)]
    headings = {"loss": "loss", "accuracy": "accuracy", "f1_macro": "macro F1"}
    headings |= {"f1_micro": "micro F1"} if shared.multi_label else {}
    headings |= {"kept": "kept", "oos_recall": "OOS recall"} if cuts else {}
    for row in scored:
        row["values"] = [row["values"].get(key, np.nan) for key in headings]
    return evaluation.result(headings.values(), scored, "rows", len(rows), notes=notes, samples=samples, predictions=predictions,
                             losses=losses, signature="accuracy and F1 0-100, F1 macro over the labels that occur", **more)


def _threshold_on(model, candidate, shared, description: str) -> float:
    """`threshold` from the candidate's dev rows."""
    features, _ = candidate.task.encode(candidate.dev, "dev rows", shared.on_bad_row, outside_alone=True)
    logits = np.array([logits for _, logits in dataset_outputs(model, candidate.task, features, description)])
    return threshold(logits, np.array(features["labels"]))


def _asked(row: dict) -> list[tuple[str, str]]:
    """What the model reads of a row, as samples and predictions show it."""
    pair = row.get("text_pair")
    if row.get("of_dialogue"):
        return [*([("context", pair)] if pair else []), ("text", row["text"])]
    return [("text", row["text"]), *([("text_pair", pair)] if pair else [])]


def _exact(probability: float) -> str:
    """Three digits, of what is missing to 1 where that is little: 0.574, 0.9999899."""
    digits = max(3, 2 - math.floor(math.log10(1 - probability))) if probability < 1 else 3
    return f"{probability:.{digits}f}"


def _scores(name, sums, logits, labels, languages, shared, cut) -> list[dict]:
    scored = []
    for language in [*sorted(set(languages)), "all"]:
        at = np.array([language in (own, "all") for own in languages])
        values = {"loss": mean_loss(sums[at])["loss"]}  # NaN where all of them are out of scope
        if shared.multi_label:
            values |= multi_label_scores(logits[at] > 0, labels[at] > 0)
        else:
            inside = at & (labels != IGNORE)
            if inside.any():
                values |= label_scores(logits[inside].argmax(1).tolist(), labels[inside].tolist())
            if cut is not None:
                kept, outside = confidence(logits) >= cut, at & (labels == IGNORE)
                values["kept"] = 100 * (kept & (logits.argmax(1) == labels))[inside].mean() if inside.any() else np.nan
                values["oos_recall"] = 100 * (~kept)[outside].mean() if outside.any() else np.nan
        scored.append({"language": language, "model": name, "count": int(at.sum()), "values": values})
    return scored


def _slices(rows, languages, logits, labels, shared) -> dict:
    """Accuracy and macro F1 of parts of the rows, by what they say of themselves; out-of-scope rows are in no part."""
    inside = np.flatnonzero(np.ones(len(rows), bool) if shared.multi_label else labels != IGNORE)
    keys = [{key: rows[i][key] for key in SLICED_BY if isinstance(rows[i].get(key), str) and key != shared.label}
            | {"language": languages[i], "length": metrics.length_class(rows[i]["text"])}
            | ({"turn": str(rows[i]["turn"]) if rows[i]["turn"] < 5 else "5+"} if isinstance(rows[i].get("turn"), int) else {})
            for i in inside]

    def scorer(values):
        def score(at):
            own, right = values[inside[at]], labels[inside[at]]
            scores = (multi_label_scores(own > 0, right > 0) if shared.multi_label
                      else label_scores(own.argmax(1).tolist(), right.tolist()))
            return [scores["accuracy"], scores["f1_macro"]]
        return score

    return evaluation.slices(keys, ["accuracy", "macro F1"], {name: scorer(values) for name, values in logits.items()})


def _right(label, names, shared) -> str:
    if shared.multi_label:
        return ", ".join(name for name, yes in zip(names, label, strict=True) if yes > 0) or "(none)"
    return shared.oos_label if label == IGNORE else names[label]


def _predicted(logits, names, shared, cut) -> str:
    if shared.multi_label:
        return _right(logits > 0, names, shared)
    if cut is not None and confidence(logits[None])[0] < cut:
        return shared.oos_label
    return names[int(logits.argmax())]
