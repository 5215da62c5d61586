"""Words and their tags: spans such as names, dates or order numbers, marked in IOB2 (`B-city` begins a span, `I-city` goes on, `O` is
outside of all).

A word may become several tokens. An encoder is asked for the tag at the first of them, as in BERT (Devlin et al., 2019,
arXiv:1810.04805); a decoder at the last, as only there it has read the word. In Chinese a character is a word. An `I-x` that continues
nothing begins a span, as conlleval and seqeval read it; such tags are counted.
"""

from collections import Counter
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForTokenClassification

from recipes.common import data, encoding, evaluation, losses, metrics, models
from recipes.common.chat import IGNORE
from recipes.common.errors import UserError
from recipes.common.scoring import dataset_outputs, mean_loss
from recipes.common.tasks import Task, flags
from recipes.common.wording import counted

MAX_LENGTH = 256
UNIT = "rows"
MODELS = dict.fromkeys(models.KINDS, AutoModelForTokenClassification)
UNTUNED_SCORES = False  # a pretrained model has no head for these tags
COLUMNS = {"loss": "loss", "f1": "F1", "precision": "precision", "recall": "recall", "f1_macro": "macro F1", "accuracy": "accuracy"}


def check(shared):
    """A row is a list of words with a tag each."""
    return data.check_tag


def rows(rows, shared) -> list[dict]:
    """A row of the file is a row of the task."""
    return rows


def facts(rows, shared) -> dict:
    """The tags that the model is to know and how often each occurs in the train rows. Raises `UserError` if all words are outside.

    A type has both its tags, `B-` and `I-`: dev rows may have longer spans than the train rows.
    """
    counts = Counter(tag for row in rows for tag in row["tags"])
    types = sorted({tag[2:] for tag in counts if tag != "O"})
    if not types:
        raise UserError("the train rows hold no tag but O: mark the words to find, as in B-city, I-city")
    return {"labels": {tag: counts[tag] for tag in ["O", *(f"{prefix}-{name}" for name in types for prefix in "BI")]}}


def make(shared, source, tokenizer, facts) -> Task:
    """The task for this model. Raises `UserError` for a tokenizer that does not say which word a token is from."""
    if not tokenizer.is_fast:
        raise UserError(f"{source.used} has no tokenizer.json, which says which word a token is from: choose another model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    names = list(facts["labels"])
    return Task("tag", "TOKEN_CLS", AutoModelForTokenClassification, source, tokenizer, shared.max_length,
                encode=partial(encode, tokenizer=tokenizer, max_length=shared.max_length, labels=names,
                               last=models.kind(source) == "decoder", processes=shared.preprocessing_num_workers),
                collate=partial(collate, tokenizer=tokenizer), loss=losses.words, outputs=_likeliest,
                metrics=partial(dev_metrics, names=names), per_token=False,
                config={"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}})


def encode(rows, name: str, on_bad_row: str = "stop", training: bool = False, *, tokenizer, max_length: int, labels: list[str],
           last: bool = False, processes: int | None = None) -> tuple[Dataset, dict]:
    """Tokenize rows into columns input_ids, (token_type_ids,) labels, each as long as the row's tokens, and words: the numbers of the
    words that have a label, in order. The label stands at a word's first token, or at its `last`.

    Words beyond `max_length` tokens and words that the tokenizer makes nothing of have no label. A type that the train rows lack is
    learned and predicted as O. Raises `UserError` if no word is left.
    """
    one = partial(_encode, tokenizer=tokenizer, max_length=max_length, index={label: i for i, label in enumerate(labels)}, last=last,
                  blank=_blanks(tokenizer))
    features, counts, _, _ = encoding.encode(rows, name, one, "row", on_bad_row, processes)
    if not counts["supervised"]:
        raise UserError(f"{name}: no word has a token within --max_length {max_length}; raise --max_length")
    sentences = []
    if counts["shortened"]:
        sentences.append(f"{counted(counts['shortened'], 'row exceeds|rows exceed')} --max_length {max_length}: at the end, "
                         f"{counted(counts['beyond'], 'word is|words are')} "
                         f"{'not trained on' if training else 'predicted as O'}")
    if counts["empty"]:
        sentences.append(f"{counted(counts['empty'], 'word is|words are')} nothing to the tokenizer (control characters, or what a broken "
                         f"file left, as �): {'not trained on' if training else 'predicted as O'}")
    if counts["stray"]:
        sentences.append(f"{counted(counts['stray'], 'tag I-... continues|tags I-... continue')} no span of the type: each begins one")
    unknown = {key[1]: n for key, n in counts.items() if isinstance(key, tuple)}
    if unknown:
        sentences.append(f"{counted(sum(unknown.values()), 'word has a type|words have types')} that the train rows lack "
                         f"({', '.join(sorted(unknown))}): they can't be found")
    if counts["unread"]:
        sentences.append(f"{counts['unread']} of {counts['supervised']} words are unknown to the tokenizer, and the same "
                         f"{tokenizer.unk_token} to the model: it goes by what stands around them")
    return features, {
        "unit": UNIT, "rows": len(rows), "kept": len(features), "left_out": [], "refused": {}, "items": "words",
        **{key: counts[key] for key in ("shortened", "tokens", "supervised")}, "sentences": sentences}


def _encode(row: dict, tokenizer, max_length: int, index: dict[str, int], last: bool, blank: bool) -> tuple[dict, Counter]:
    tokens, tags = row["tokens"], row["tags"]
    whole = tokenizer(spaced(tokens) if blank else tokens, is_split_into_words=True)
    encoding = tokenizer(spaced(tokens) if blank else tokens, is_split_into_words=True, truncation=True, max_length=max_length)
    # Cut words of a decoder have no last token: whole words only.
    sizes, places = Counter(whole.word_ids()), {}
    for at, word in enumerate(encoding.word_ids()):
        if word is not None:
            places.setdefault(word, []).append(at)
    places = {word: at for word, at in places.items() if len(at) == sizes[word]}
    feature = {key: encoding[key] for key in ("input_ids", "token_type_ids") if key in encoding}
    feature["labels"], feature["words"] = [IGNORE] * len(encoding["input_ids"]), list(places)
    for word, at in places.items():
        feature["labels"][at[-1] if last else at[0]] = index.get(tags[word], 0)
    counts = Counter(("unknown", tag[2:]) for tag in tags if tag not in index)
    counts["stray"] = len(metrics.stray_tags(tags))
    counts["shortened"] = len(whole["input_ids"]) > max_length
    counts["empty"] = len(tokens) - len(sizes.keys() - {None})
    counts["unread"] = sum(encoding["input_ids"][at[0]] == tokenizer.unk_token_id for at in places.values())
    counts["beyond"] = len(sizes.keys() - {None}) - len(places)
    counts["tokens"] = len(encoding["input_ids"])
    counts["supervised"] = len(places)
    return feature, counts


def _blanks(tokenizer) -> bool:
    """Whether words must be handed over with the blank before them, for the tokens of running text (byte-level BPE: GPT-2, Llama 3)."""
    split = partial(tokenizer, is_split_into_words=True, add_special_tokens=False)
    text = tokenizer("a b", add_special_tokens=False)["input_ids"]
    return split(["a", "b"])["input_ids"] != text == split(["a", " b"])["input_ids"]


def spaced(tokens: list[str]) -> list[str]:
    """Words with the blank before each that running text would have: none at the start, and none beside Chinese or Japanese."""
    return tokens[:1] + [word if metrics.unspaced(before[-1:]) or metrics.unspaced(word[:1]) else f" {word}"
                         for before, word in zip(tokens, tokens[1:], strict=False)]


def collate(features: list[dict], tokenizer) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, token_type_ids and labels, each (batch, length), padded on the right."""
    rows = [{key: feature[key] for key in ("input_ids", "token_type_ids") if key in feature} for feature in features]
    batch = dict(tokenizer.pad(rows, padding_side="right", return_tensors="pt"))
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORE)
    for i, feature in enumerate(features):
        batch["labels"][i, : len(feature["labels"])] = torch.tensor(feature["labels"])
    return batch


def _likeliest(parts) -> tuple[torch.Tensor]:
    """(batch, length) the number of the likeliest tag at each labelled token, IGNORE elsewhere."""
    [part] = parts
    out = torch.full(part.where.shape, IGNORE, device=part.where.device)
    out[part.where] = part.logits.argmax(-1)
    return (out,)


def dev_metrics(predicted: np.ndarray, labels: np.ndarray, *, names: list[str]) -> dict[str, float]:
    """F1, precision and recall of the spans, 0-100, over the words that have a label, as the model is asked to give it.

    Words beyond --max_length have none, and a type that the train rows lack is O; `evaluate` counts what is missed by either.
    """
    keep = labels != IGNORE
    as_tags = [[[names[i] for i in row[mask]] for row, mask in zip(values, keep, strict=True)] for values in (predicted, labels)]
    average = metrics.span_report(*as_tags)["micro avg"]
    return {"f1": 100 * average["f1-score"], "precision": 100 * average["precision"], "recall": 100 * average["recall"]}


def evaluate(candidates: dict, task: Task, rows: list[dict], record: dict, options) -> dict:
    """F1 of the spans, by language and in all, with a report on each type. A word without a prediction counts as O."""
    names = list(task.config["label2id"])
    read = evaluation.encoded(candidates, rows, flags(record).on_bad_row)
    notes = [*evaluation.sentences(read), *(["--base adds no line: the untuned model has no head for these tags"] if options.base else [])]
    languages = [metrics.language_of(row, " ".join(row["tokens"])) for row in rows]
    right = [row["tags"] for row in rows]
    scored, predicted, losses = [], {}, {}
    for name, candidate in candidates.items():
        features, _ = read[name]
        outputs = dataset_outputs(candidate.load(), candidate.task, features, f"Tags of {name}")
        losses[name] = {i: sums.tolist() for i, (sums, _) in enumerate(outputs)}
        predicted[name] = [["O"] * len(row["tokens"]) for row in rows]
        for tags, words, (_, likeliest) in zip(predicted[name], features["words"], outputs, strict=True):
            for word, label in zip(words, likeliest[likeliest != IGNORE], strict=True):
                tags[word] = names[label]
        for language in [*sorted(set(languages)), "all"]:
            at = [i for i, own in enumerate(languages) if language in (own, "all")]
            report = metrics.span_report([predicted[name][i] for i in at], [right[i] for i in at])
            average = report["micro avg"]
            values = {"loss": mean_loss(np.array([outputs[i][0] for i in at]))["loss"], "f1": 100 * average["f1-score"],
                      "precision": 100 * average["precision"], "recall": 100 * average["recall"],
                      "f1_macro": 100 * report["macro avg"]["f1-score"], "accuracy": 100 * report["accuracy"]}
            scored.append({"language": language, "model": name, "count": len(at), "values": [values[key] for key in COLUMNS]})
    samples = [[("text", "".join(spaced(rows[i]["tokens"]))), ("right", shown(rows[i]["tokens"], right[i])),
                *((name, shown(rows[i]["tokens"], tags[i])) for name, tags in predicted.items())]
               for i in evaluation.reported(len(rows), options)]
    predictions = [{"id": row.get("id", i), "row": i, "language": languages[i], "tokens": row["tokens"], "tags": right[i],
                    **{name: tags[i] for name, tags in predicted.items()}} for i, row in enumerate(rows)]

    def scorer(tags):
        def score(at):
            average = metrics.span_report([tags[i] for i in at], [right[i] for i in at])["micro avg"]
            return [100 * average[key] for key in ("f1-score", "precision", "recall")]
        return score

    keys = [{"language": language, "length": metrics.length_class("".join(spaced(row["tokens"])))}
            for language, row in zip(languages, rows, strict=True)]
    slices = evaluation.slices(keys, ["F1", "precision", "recall"], {name: scorer(tags) for name, tags in predicted.items()})
    return evaluation.result(COLUMNS.values(), scored, "rows", len(rows), slices=slices, notes=notes, samples=samples,
                             predictions=predictions, losses=losses, report=metrics.span_report(predicted[name], right),
                             signature="a span is right if its type and both its ends are; F1, precision, recall 0-100 over all spans, "
                                       "macro F1 over types, accuracy over words")


def shown(tokens: list[str], tags: list[str]) -> str:
    """The spans as a line of text: "city: New York; date: Friday"."""
    spans = metrics.spans(tags)
    return "; ".join(f"{kind}: {''.join(spaced(tokens[start:end]))}" for kind, start, end in spans) or "(none)"
