"""Scores for generated replies (BLEU, ROUGE, chrF, distinct-n, perplexity) and for labels (accuracy, F1).

The metrics are `evaluate.Metric` classes that run offline: `Bleu().compute(predictions=..., references=...)`, or
several at once with `evaluate.combine([Bleu(), Rouge()])`. `score_replies` is the one call for a whole test set.

Text metrics take `predictions`, a list of n strings, and `references`, a list of n entries, each one string or a
non-empty list of strings; the entries may hold different numbers of references. An empty prediction is a reply like any
other and earns 0. Input of another shape is a ValueError, raised before anything is scored.

BLEU, ROUGE and chrF run from 0 to 100, as papers print them; distinct-n, accuracy and F1 from 0 to 1.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from itertools import zip_longest

import evaluate
import numpy as np
import sacrebleu
from datasets import Features, List, Value
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

# Han ideographs: extension A, the main block, the compatibility block, and planes 2 and 3, which hold the rare ones.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# All that CJK text writes without spaces: radicals, punctuation, kana, ideographs, hangul, full-width forms. It starts
# again at U+3001 because U+3000 is a space.
_CJK = "\u2e80-\u2fff\u3001-\u9fff\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff01-\uffef\U00020000-\U0003ffff"
_HAN_CHARACTER = re.compile(f"[{_HAN}]")
_CJK_CHARACTER = re.compile(f"([{_CJK}])")
_BLEU_TOKENIZERS = {"en": Tokenizer13a(), "zh": TokenizerZh()}
# Strings first: evaluate takes the first kind that fits, and "1" would fit an integer.
_LABELS = [Features({"predictions": Value(kind), "references": Value(kind)}) for kind in ("string", "int64")]


def detect_language(text: str) -> str:
    """Return "zh" when more than a fifth of the letters of `text` are Han characters, else "en".

    A fifth, because one Han character says about as much as one English word of five letters: a Chinese sentence that
    quotes a product name stays "zh", and an English one that quotes a Chinese name stays "en". Text without letters,
    such as a number, is "en".
    """
    letters = sum(character.isalpha() for character in text)
    return "zh" if len(_HAN_CHARACTER.findall(text)) > 0.2 * letters else "en"


def language_of(row: dict, text: str) -> str:
    """A row's own "language" if it is one that the metrics cut specially, else that of its `text`."""
    return row["language"] if row.get("language") in ("en", "zh") else detect_language(text)


def unspaced(character: str) -> bool:
    """Whether text writes this character without blanks around it: Chinese, Japanese, full-width signs."""
    return bool(_CJK_CHARACTER.match(character)) and not "\uac00" <= character <= "\ud7af"  # Korean has blanks between words


class CjkTokenizer(Tokenizer):
    """Tokens for ROUGE and distinct-n: each CJK character is one, the text in between is cut as rouge_score does.

    rouge_score alone keeps only a-z and 0-9, so Chinese would have no tokens and score 0. Text without CJK characters
    gets exactly the tokens of `rouge_score.tokenizers.DefaultTokenizer`. CJK punctuation counts as a character, as in
    sacrebleu's "zh" tokenizer and in the usual character ROUGE for Chinese.
    """

    name = "cjk-characters+rouge-score-default"

    def __init__(self, use_stemmer: bool = False):
        self._default = DefaultTokenizer(use_stemmer)

    def tokenize(self, text: str) -> list[str]:
        tokens = []
        # The group in the pattern makes split() return the separators too: text, character, text, character, ..., text.
        for position, piece in enumerate(_CJK_CHARACTER.split(text)):
            tokens += [piece] if position % 2 else self._default.tokenize(piece)
        return tokens


class _OfflineMetric(evaluate.Metric):
    """What the metrics below share: inputs are kept in memory, so no cache files and no locks between processes."""

    inputs = Features({"predictions": Value("string"), "references": List(Value("string"))})

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _info(self):
        description = type(self).__doc__
        return evaluate.MetricInfo(description=description, citation="", inputs_description="", features=self.inputs)

    def add_batch(self, *, predictions=None, references=None):
        """Add n predictions and their n references; `compute()` without arguments then scores all that was added."""
        super().add_batch(predictions=predictions, references=_reference_lists(predictions, references))

    def add(self, *, prediction=None, reference=None):
        """Add one prediction and its reference or references."""
        self.add_batch(predictions=[prediction], references=[reference])


class Bleu(_OfflineMetric):
    """Corpus BLEU, 0-100 (Papineni et al., 2002; as defined by sacrebleu: Post, 2018, arXiv:1804.08771).

    `tokenize` is "13a" for English and other European languages, "zh" for Chinese, "none" for text that is tokenized
    already. `options` are further arguments of `sacrebleu.BLEU`, such as `smooth_method` or `max_ngram_order`. A corpus
    without one reply of four tokens has no 4-grams and scores 0 by definition.

    `compute` returns "bleu" and what it is made of ("precisions" in percent, "counts", "totals", brevity penalty "bp",
    lengths "sys_len" and "ref_len" in tokens), with sacrebleu's "bleu_signature".
    """

    def __init__(self, tokenize: str = "13a", lowercase: bool = False, **options):
        super().__init__()
        self._scorer = sacrebleu.BLEU(tokenize=tokenize, lowercase=lowercase, **options)

    def _compute(self, predictions, references):
        result = self._scorer.corpus_score(predictions, streams(references))
        return {
            "bleu": result.score,
            "precisions": result.precisions,
            "counts": result.counts,
            "totals": result.totals,
            "bp": result.bp,
            "sys_len": result.sys_len,
            "ref_len": result.ref_len,
            "bleu_signature": str(self._scorer.get_signature()),
        }


class ChrF(_OfflineMetric):
    """Corpus chrF2, 0-100: F-score of character n-grams (Popović, 2015, aclanthology.org/W15-3049), by sacrebleu.

    `options` are arguments of `sacrebleu.CHRF`; `word_order=2` gives chrF++. `compute` returns "chrf" and sacrebleu's
    "chrf_signature".
    """

    def __init__(self, **options):
        super().__init__()
        self._scorer = sacrebleu.CHRF(**options)

    def _compute(self, predictions, references):
        score = self._scorer.corpus_score(predictions, streams(references)).score
        return {"chrf": score, "chrf_signature": str(self._scorer.get_signature())}


class Rouge(_OfflineMetric):
    """ROUGE F-measures, 0-100 (Lin, 2004, aclanthology.org/W04-1013), by rouge_score, in English and Chinese.

    Each score is the mean over the replies; a reply with several references counts its best one. English scores equal
    rouge_score at its defaults, times 100. `compute` returns one entry for each name in `rouge_types`.
    """

    def __init__(self, rouge_types=("rouge1", "rouge2", "rougeL"), use_stemmer: bool = False):
        super().__init__()
        self._scorer = RougeScorer(list(rouge_types), tokenizer=CjkTokenizer(use_stemmer))

    def _compute(self, predictions, references):
        scores = [self._scorer.score_multi(refs, prediction) for prediction, refs in zip(predictions, references, strict=True)]
        return {
            name: 100 * sum(float(score[name].fmeasure) for score in scores) / len(scores)
            for name in self._scorer.rouge_types
        }


class Distinct(_OfflineMetric):
    """Distinct-1 and distinct-2, 0-1: how varied the replies are as a whole (Li et al., 2016, arXiv:1510.03055).

    Unique n-grams of all replies, divided by all their n-grams; no n-gram crosses from one reply into the next. (The
    paper divides bigrams by the number of words; dividing by the bigrams is what most later work prints.) The value
    falls as the number of replies grows: compare systems on the same test set only. Replies without any n-gram score 0.

    `compute(predictions=...)` returns "distinct1" and "distinct2"; it needs no references and ignores them.
    """

    inputs = Features({"predictions": Value("string")})

    def add_batch(self, *, predictions=None):
        """Add n predictions; `compute()` without arguments then scores all that was added."""
        _check_strings("predictions", predictions)
        evaluate.Metric.add_batch(self, predictions=predictions)

    def add(self, *, prediction=None):
        """Add one prediction."""
        self.add_batch(predictions=[prediction])

    def _compute(self, predictions):
        tokenizer = CjkTokenizer()
        sentences = [tokenizer.tokenize(prediction) for prediction in predictions]
        scores = {}
        for n in (1, 2):
            ngrams = [tuple(tokens[i : i + n]) for tokens in sentences for i in range(len(tokens) - n + 1)]
            scores[f"distinct{n}"] = len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        return scores


def perplexity(total_nll: float, tokens: int) -> float:
    """Return exp(total_nll / tokens): `total_nll` is in nats, summed over the `tokens` that were predicted.

    Sum over all batches first: the mean of the batches' perplexities, or of their mean losses, is another number when
    they differ in length. An overflow gives inf and a NaN stays NaN; zero tokens are a ValueError.
    """
    if tokens <= 0:
        raise ValueError(f"Perplexity needs at least one predicted token, got {tokens}.")
    mean = total_nll / tokens
    return math.inf if mean > 709 else math.exp(mean)  # exp(709.8) is past the largest float


class _LabelMetric(_OfflineMetric):
    """Metrics of one label against one label; labels are all strings or all integers."""

    inputs = _LABELS

    def add_batch(self, *, predictions=None, references=None):
        """Add n predicted labels and the n right ones; `compute()` without arguments then scores all that was added."""
        _check_lengths(predictions, references)
        evaluate.Metric.add_batch(self, predictions=predictions, references=references)


class Accuracy(_LabelMetric):
    """Share of predictions that equal their reference, 0-1; `compute` returns "accuracy"."""

    def _compute(self, predictions, references):
        return {"accuracy": classification_report(predictions, references)["accuracy"]}


class F1(_LabelMetric):
    """Macro F1, 0-1: the plain mean of the labels' F1, as scikit-learn's `average="macro"`.

    A label that is only ever predicted, never right, counts too, with F1 0. `compute` returns "f1_macro".
    """

    def _compute(self, predictions, references):
        return {"f1_macro": classification_report(predictions, references)["macro avg"]["f1-score"]}


def classification_report(predictions, references) -> dict:
    """Return precision, recall, F1 (0-1) and support (count) of each label, with "accuracy" and two averages.

    Keys and values are those of scikit-learn's `classification_report(..., output_dict=True, zero_division=0)`: one
    dict for each label that occurs on either side (its name as a string), "accuracy", "macro avg" and "weighted avg".
    """
    _check_lengths(predictions, references)
    predicted, support = Counter(predictions), Counter(references)
    hits = Counter(p for p, r in zip(predictions, references, strict=True) if p == r)
    rows = {str(label): _scores_of(hits[label], predicted[label], support[label]) for label in sorted(predicted.keys() | support.keys())}
    return {**rows, "accuracy": hits.total() / len(references), **_averages(rows)}


def multi_label_report(predictions: np.ndarray, references: np.ndarray, labels: list[str]) -> dict:
    """Precision, recall, F1 (0-1) and support (count) of each label, where a row has any number of them; and three averages.

    predictions and references: (rows, labels) of true and false. Keys and values are those of scikit-learn's
    `classification_report(..., target_names=labels, output_dict=True, zero_division=0)`, without "samples avg".
    """
    sums = [(predictions & references).sum(0), predictions.sum(0), references.sum(0)]
    rows = {label: _scores_of(*counts) for label, *counts in zip(labels, *(column.tolist() for column in sums), strict=True)}
    return {**rows, "micro avg": _scores_of(*(int(column.sum()) for column in sums)), **_averages(rows)}


def _scores_of(hits: int, predicted: int, support: int) -> dict:
    return {"precision": hits / max(predicted, 1), "recall": hits / max(support, 1), "f1-score": 2 * hits / max(predicted + support, 1),
            "support": support}


def _averages(rows: dict[str, dict]) -> dict:
    averages, support = {}, sum(row["support"] for row in rows.values())
    for name, weight in (("macro avg", lambda row: 1), ("weighted avg", lambda row: row["support"])):
        total = max(sum(map(weight, rows.values())), 1)
        averages[name] = {score: sum(weight(row) * row[score] for row in rows.values()) / total
                          for score in ("precision", "recall", "f1-score")}
        averages[name]["support"] = support
    return averages


def confusion_matrix(predictions, references, most: int = 12) -> dict:
    """{"labels": [...], "matrix": [[...]]}: how often the label of a row was taken for that of a column, as counts.

    Of more than `most` labels, those that are mistaken most often, either way.
    """
    _check_lengths(predictions, references)
    pairs = Counter(zip(references, predictions, strict=True))
    mistakes = Counter()
    for (right, predicted), count in pairs.items():
        if right != predicted:
            mistakes.update({right: count, predicted: count})
    labels = sorted({*predictions, *references})
    if len(labels) > most:
        labels = sorted(sorted(labels, key=lambda label: -mistakes[label])[:most])
    return {"labels": labels, "matrix": [[pairs[right, predicted] for predicted in labels] for right in labels]}


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The spans that IOB2 tags mark, as (type, first word, word after the last), in order.

    An `I-x` that continues no x begins a span, as in conlleval (Tjong Kim Sang and Buchholz, 2000) and seqeval's default mode.
    """
    found = []
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix == "I" and found and (found[-1][0], found[-1][2]) == (kind, i):
            found[-1] = (kind, found[-1][1], i + 1)
        elif tag != "O":
            found.append((kind, i, i + 1))
    return found


def stray_tags(tags: Sequence[str]) -> list[int]:
    """Where in IOB2 tags an `I-x` continues no x, as after `O` or `B-y`."""
    return [i for i, tag in enumerate(tags) if tag[0] == "I" and (i == 0 or tags[i - 1][1:] != tag[1:])]


def span_report(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict:
    """Return precision, recall, F1 (0-1) and support (count) of the spans of each type, from the tags of n rows of words.

    A span is right if its type and both its ends are. Keys and values are those of seqeval's `classification_report(...,
    output_dict=True, zero_division=0)`: a dict for each type on either side, "micro avg", "macro avg" and "weighted avg"; and
    "accuracy", the share of words with the right tag.
    """
    _check_lengths(predictions, references)
    predicted, support, hits = Counter(), Counter(), Counter()
    for i, (tags, right) in enumerate(zip(predictions, references, strict=True)):
        if len(tags) != len(right):
            raise ValueError(f"row {i} has {len(tags)} predicted tags but {len(right)} right ones: give one for each word.")
        own, true = spans(tags), spans(right)
        predicted.update(kind for kind, *_ in own)
        support.update(kind for kind, *_ in true)
        hits.update(kind for kind, *_ in set(own) & set(true))
    rows = {kind: _span_scores(hits[kind], predicted[kind], support[kind]) for kind in sorted(predicted.keys() | support.keys())}
    averages = {"micro avg": _span_scores(hits.total(), predicted.total(), support.total())}
    for name, weight in (("macro avg", lambda row: 1), ("weighted avg", lambda row: row["support"])):
        total = sum(map(weight, rows.values()))
        averages[name] = {score: sum(weight(row) * row[score] for row in rows.values()) / max(total, 1)
                          for score in ("precision", "recall", "f1-score")} | {"support": support.total()}
    same = [tag == right for pair in zip(predictions, references, strict=True) for tag, right in zip(*pair, strict=True)]
    return {**rows, "accuracy": sum(same) / max(len(same), 1), **averages}


def _span_scores(hits: int, predicted: int, support: int) -> dict[str, float]:
    return {"precision": hits / max(predicted, 1), "recall": hits / max(support, 1),
            "f1-score": 2 * hits / max(predicted + support, 1), "support": support}


def score_replies(predictions, references, languages=None) -> dict:
    """Score generated replies, all together and by language.

    `predictions`: n strings. `references`: n entries, each a string or a list of strings. `languages`: n times "en" or
    "zh"; without it, `detect_language` decides by the references of each item, never by the prediction, so a reply in
    the wrong language is scored where it belongs.

    Returns {"all": {...}, "en": {...}, "zh": {...}, "signature": "..."}, without a language that does not occur. Each
    inner dict holds "bleu", "rouge1", "rouge2", "rougeL", "chrf" (0-100), "distinct1", "distinct2" (0-1), "n" (replies)
    and "empty" (replies without a visible character; they count as 0 and are never left out). BLEU cuts English items
    with sacrebleu's "13a" and Chinese ones with its "zh"; "all" is one corpus of both. "signature" names tokenizers,
    settings and library versions: what it takes to repeat the figures, or to know that two are on one scale.

    Raises ValueError when the lists differ in length or are empty, an item is not text, or a language is another one.
    """
    references = _reference_lists(predictions, references)
    if languages is None:
        languages = [detect_language(" ".join(refs)) for refs in references]
    if len(languages) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions but {len(languages)} languages: give one language for each.")
    unknown = set(languages) - set(_BLEU_TOKENIZERS)
    if unknown:
        raise ValueError(f'Unknown languages {sorted(map(str, unknown))}: each must be "en" or "zh".')

    bleu, chrf, rouge, distinct = Bleu(tokenize="none", force=True), ChrF(), Rouge(), Distinct()
    result = {}
    for group in ["all", *sorted(set(languages))]:
        rows = [i for i, language in enumerate(languages) if group in ("all", language)]
        texts, refs = [predictions[i] for i in rows], [references[i] for i in rows]
        # Tokenizing here, item by item, lets one corpus hold both languages; "none" then only splits at the spaces.
        # sacrebleu strips the right-hand end before it tokenizes, so that is done here too.
        cut = [_BLEU_TOKENIZERS[languages[i]] for i in rows]
        bleu_scores = bleu.compute(
            predictions=[tokenize(text.rstrip()) for tokenize, text in zip(cut, texts, strict=True)],
            references=[[tokenize(ref.rstrip()) for ref in item] for tokenize, item in zip(cut, refs, strict=True)],
        )
        chrf_scores = chrf.compute(predictions=texts, references=refs)
        result[group] = {
            "bleu": bleu_scores["bleu"],
            **rouge.compute(predictions=texts, references=refs),
            "chrf": chrf_scores["chrf"],
            **distinct.compute(predictions=texts),
            "n": len(rows),
            "empty": sum(not text.strip() for text in texts),
        }
        if group == "all":
            tokenizers = "+".join(_BLEU_TOKENIZERS[language].signature() for language in sorted(set(languages)))
            signature = [
                "BLEU " + bleu_scores["bleu_signature"].replace("tok:none", f"tok:{tokenizers}"),
                "chrF2 " + chrf_scores["chrf_signature"],
                f"ROUGE F1|refs:best|stem:no|tok:{CjkTokenizer.name}|rouge-score:{version('rouge-score')}",
                f"distinct corpus|per:n-grams|tok:{CjkTokenizer.name}|rouge-score:{version('rouge-score')}",
            ]
    return {**result, "signature": "; ".join(signature)}


def part_scorer(predictions, references, languages):
    """A function from positions to {"bleu", "rougeL", "chrf"} of these replies alone, as `score_replies` gives them in "all".

    For many small parts of one test set: each reply is cut and compared once. Takes what `score_replies` takes.
    """
    references = _reference_lists(predictions, references)
    cut = [_BLEU_TOKENIZERS[language] for language in languages]
    tokens = [tokenize(text.rstrip()) for tokenize, text in zip(cut, predictions, strict=True)]
    reference_tokens = [[tokenize(ref.rstrip()) for ref in refs] for tokenize, refs in zip(cut, references, strict=True)]
    rouge = RougeScorer(["rougeL"], tokenizer=CjkTokenizer())
    rouge_l = [100 * float(rouge.score_multi(refs, text)["rougeL"].fmeasure) for text, refs in zip(predictions, references, strict=True)]
    bleu, chrf = sacrebleu.BLEU(tokenize="none", force=True), sacrebleu.CHRF()

    def score(at: list[int]) -> dict[str, float]:
        return {"bleu": bleu.corpus_score([tokens[i] for i in at], streams([reference_tokens[i] for i in at])).score,
                "rougeL": sum(rouge_l[i] for i in at) / len(at),
                "chrf": chrf.corpus_score([predictions[i] for i in at], streams([references[i] for i in at])).score}

    return score


def length_class(text: str) -> str:
    """How long a text is, in words, or characters of Chinese: "1-10", "11-20", "21-40" or "41+"."""
    length = len(CjkTokenizer().tokenize(text))
    return next((name for name, most in (("1-10", 10), ("11-20", 20), ("21-40", 40)) if length <= most), "41+")


def streams(references):
    """Turn n lists of references into sacrebleu's streams: the first reference of all items, the second, ..."""
    return list(zip_longest(*references))  # items with fewer references are padded with None, which sacrebleu skips


def tokenizer_of(language: str):
    """The function that cuts a text of this language, "en" or "zh", for BLEU."""
    return _BLEU_TOKENIZERS[language]


def _reference_lists(predictions, references) -> list[list[str]]:
    """Check text inputs and return the references as one list of strings for each prediction."""
    _check_lengths(predictions, references)
    _check_strings("predictions", predictions)
    lists = [[entry] if isinstance(entry, str) else entry for entry in references]
    for position, entry in enumerate(lists):
        _check_strings(f"references[{position}]", entry)
    return [list(entry) for entry in lists]


def _check_lengths(predictions, references):
    for name, values in (("predictions", predictions), ("references", references)):
        if values is None or isinstance(values, str):
            raise ValueError(f"{name} must be a list with one entry for each item, got {values!r}.")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: give one entry for each.")
    if len(predictions) == 0:
        raise ValueError("Nothing to score: predictions and references are empty.")


def _check_strings(name, values):
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) == 0:
        raise ValueError(f"{name} must be a list of at least one string, got {values!r}.")
    wrong = [position for position, value in enumerate(values) if not isinstance(value, str)]
    if wrong:
        raise ValueError(f'{name}[{wrong[0]}] must be a string ("" for an empty reply), got {values[wrong[0]]!r}.')
