"""What evaluate.py wrote about a run's answers -> counts of each held-out item, whose sums give the scores (statistics.py).

An item is a row: of chat a whole dialogue, as the turns of one dialogue succeed or fail together and are no independent draws; of pretrain
a block, in which texts may be joined.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from recipes.common import metrics
from recipes.common.metrics import CjkTokenizer

BLEU, CHRF = sacrebleu.BLEU(tokenize="none", force=True), sacrebleu.CHRF()  # as metrics.score_replies has them


@dataclass(frozen=True)
class Metric:
    """A score: `score` maps summed counts (..., k) to (...)."""

    title: str
    unit: str
    higher_is_better: bool
    digits: int
    score: Callable[[np.ndarray], np.ndarray]


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first of two counts over the second; NaN for 0 of 0."""
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def exp_of_ratio(sums: np.ndarray) -> np.ndarray:
    """exp of `ratio`; infinite for what is too large."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def percent(sums: np.ndarray) -> np.ndarray:
    """100 times `ratio`."""
    return 100 * ratio(sums)


def f1_micro(sums: np.ndarray) -> np.ndarray:
    """F1, 0-100, of summed (hits, predicted, right)."""
    return 200 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1)


def f1_macro(sums: np.ndarray) -> np.ndarray:
    """Mean F1, 0-100, of the labels that occur; (hits, predicted, right) of each label in turn."""
    hits, predicted, right = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    occurs = predicted + right > 0
    return 100 * (2 * hits / np.maximum(predicted + right, 1)).sum(-1) / np.maximum(occurs.sum(-1), 1)


def _corpus(metric) -> Callable:
    return lambda sums: np.apply_along_axis(lambda row: metric._compute_score_from_stats(list(row)).score, -1, sums)


METRICS = {
    "loss": Metric("loss", "nats per item trained on", False, 3, ratio),
    "perplexity": Metric("perplexity", "exp of the loss", False, 2, exp_of_ratio),
    "bleu": Metric("BLEU", "0-100", True, 2, _corpus(BLEU)),
    "chrf": Metric("chrF", "0-100", True, 2, _corpus(CHRF)),
    "rougeL": Metric("ROUGE-L", "0-100", True, 2, percent),
    "accuracy": Metric("accuracy", "0-100; rows turned away rightly count", True, 2, percent),
    "f1_macro": Metric("macro F1", "0-100, over the labels that occur", True, 2, f1_macro),
    "f1": Metric("F1", "0-100, of spans", True, 2, f1_micro),
}
# What each task is compared by, its main metric first. Loss leads where replies are open: it is over every token, so the surest.
OF_TASK = {
    "chat": ("loss", "perplexity", "bleu", "rougeL", "chrf"),
    "translate": ("bleu", "chrf", "rougeL", "loss", "perplexity"),
    "classify": ("accuracy", "f1_macro", "loss"),
    "tag": ("f1", "loss"),
    "pretrain": ("loss", "perplexity"),
}

UNITS = {"pretrain": "blocks"}  # what an item is, where it is no row: texts are joined and cut


def counts(task: str, lines: list[dict], losses: dict[str, list[float]], name: str) -> dict[str, np.ndarray]:
    """The counts (items, k) of each metric of `task` for the model `name`.

    `lines` are those of predictions-SPLIT.jsonl; `losses` is row -> (nats, items trained on). Items are in the order of their row
    numbers, those of `lines` and `losses` together.
    """
    answers = _OF_ANSWERS[task](lines, name) if lines else {}
    rows = sorted(({line["row"] for line in lines} if answers else set()) | {int(row) for row in losses})
    at = {row: i for i, row in enumerate(rows)}
    nll = np.zeros((len(rows), 2))
    for row, sums in losses.items():
        nll[at[int(row)]] = sums
    found = {"loss": nll, "perplexity": nll} if losses else {}
    for metric, values in answers.items():
        where = np.array([at[line["row"]] for line in lines], dtype=int)
        found[metric] = np.zeros((len(rows), values.shape[1]))
        np.add.at(found[metric], where, values)
    return {metric: found[metric] for metric in OF_TASK[task] if metric in found}


def _of_texts(lines: list[dict], name: str) -> dict[str, np.ndarray]:
    answers = [line[name] for line in lines]
    references = [line["references"] if "references" in line else [line["reference"]] for line in lines]
    cut = [metrics.tokenizer_of(line["language"]) for line in lines]
    bleu = BLEU._extract_corpus_statistics([tokenize(text.rstrip()) for tokenize, text in zip(cut, answers, strict=True)], metrics.streams(
        [[tokenize(ref.rstrip()) for ref in refs] for tokenize, refs in zip(cut, references, strict=True)]))
    scorer = RougeScorer(["rougeL"], tokenizer=CjkTokenizer())
    rouge = [scorer.score_multi(refs, text)["rougeL"].fmeasure for refs, text in zip(references, answers, strict=True)]
    return {"bleu": np.array(bleu, dtype=float), "rougeL": np.column_stack([rouge, np.ones(len(lines))]),
            "chrf": np.array(CHRF._extract_corpus_statistics(answers, metrics.streams(references)), dtype=float)}


def _of_labels(lines: list[dict], name: str) -> dict[str, np.ndarray]:
    pairs = [(line[name], line["label"]) for line in lines]
    accuracy = np.array([[predicted == right, 1] for predicted, right in pairs], dtype=float)
    labels = {label: i for i, label in enumerate(sorted({label for pair in pairs for label in pair}))}
    f1 = np.zeros((len(lines), len(labels), 3))
    for i, (predicted, right) in enumerate(pairs):
        f1[i, labels[predicted], 1] += 1
        f1[i, labels[right], 2] += 1
        f1[i, labels[right], 0] += predicted == right
    return {"accuracy": accuracy, "f1_macro": f1.reshape(len(lines), -1)}


def _of_tags(lines: list[dict], name: str) -> dict[str, np.ndarray]:
    pairs = [(set(metrics.spans(line[name])), set(metrics.spans(line["tags"]))) for line in lines]
    return {"f1": np.array([[len(own & right), len(own), len(right)] for own, right in pairs], dtype=float)}


_OF_ANSWERS = {"chat": _of_texts, "translate": _of_texts, "classify": _of_labels, "tag": _of_tags, "pretrain": lambda lines, name: {}}
