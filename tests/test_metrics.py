"""The scores mean what their names say: behaviour first, then figures that others published.

    python -m pytest tests/test_metrics.py

The few golden cases in this file run everywhere. The larger collection that they were taken from, with the outputs of
E2E systems, is used when it lies beside the checkout (../shared) and skipped when it does not.
"""

import json
import math
import socket
from pathlib import Path

import evaluate
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from recipes.common.metrics import (
    F1,
    Accuracy,
    Bleu,
    ChrF,
    CjkTokenizer,
    Distinct,
    Rouge,
    classification_report,
    detect_language,
    perplexity,
    score_replies,
)

TEXT_METRICS = [Bleu, ChrF, Rouge]
SCORES = ["bleu", "rouge1", "rouge2", "rougeL", "chrf", "distinct1", "distinct2"]

ENGLISH = ["Your order left our warehouse this morning.", "I am sorry, the blue one is sold out until Friday."]
ENGLISH_REFERENCES = [
    ["Your order left the warehouse this morning.", "It left our warehouse today."],
    ["Sorry, the blue one is sold out until next Friday."],
]
CHINESE = ["您的订单今天早上已经发货了。", "很抱歉，蓝色的 iPhone 12 卖完了。"]
CHINESE_REFERENCES = [["您的订单今天上午已发货。"], ["抱歉，蓝色 iPhone 12 已经卖完了。", "没有蓝色的了。"]]


# ---------------------------------------------------------------------------------------------- what the scores mean


@pytest.mark.parametrize("replies, tokenize", [(ENGLISH, "13a"), (CHINESE, "zh")])
def test_a_perfect_reply_scores_100_and_an_unrelated_one_0(replies, tokenize):
    metric = evaluate.combine([Bleu(tokenize=tokenize), Rouge(), ChrF()])
    perfect = metric.compute(predictions=replies, references=replies)
    unrelated = metric.compute(predictions=["%", "%"], references=replies)
    for name in ("bleu", "rouge1", "rouge2", "rougeL", "chrf"):
        assert perfect[name] == pytest.approx(100)
        assert unrelated[name] == 0


def test_chinese_bleu_counted_by_hand():
    # 7 characters each; in common are 我 喜 欢 吃 。, then 我喜 喜欢 欢吃, then 2 trigrams and 1 four-gram.
    result = Bleu(tokenize="zh").compute(predictions=["我喜欢吃苹果。"], references=["我喜欢吃香蕉。"])
    assert (result["counts"], result["totals"]) == ([5, 3, 2, 1], [7, 6, 5, 4])
    assert result["bleu"] == pytest.approx(100 * (5 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** (1 / 4))


def test_the_english_tokenizer_would_score_this_chinese_reply_0():
    assert Bleu().compute(predictions=["我喜欢吃苹果。"], references=["我喜欢吃香蕉。"])["bleu"] == 0


def test_bleu_uses_all_references_of_an_item_whatever_their_number():
    result = Bleu().compute(predictions=ENGLISH, references=ENGLISH_REFERENCES)
    streams = [[ENGLISH_REFERENCES[0][0], ENGLISH_REFERENCES[1][0]], [ENGLISH_REFERENCES[0][1], None]]
    assert result["bleu"] == sacrebleu.BLEU().corpus_score(ENGLISH, streams).score
    assert "nrefs:var" in result["bleu_signature"]
    first_only = Bleu().compute(predictions=ENGLISH, references=[refs[0] for refs in ENGLISH_REFERENCES])
    assert first_only["bleu"] != result["bleu"]


def test_lowercase_bleu_ignores_case():
    shouted = [reply.upper() for reply in ENGLISH]
    assert Bleu(lowercase=True).compute(predictions=shouted, references=ENGLISH)["bleu"] == pytest.approx(100)
    assert Bleu().compute(predictions=shouted, references=ENGLISH)["bleu"] < 20


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_english_rouge_is_rouge_score(use_stemmer):
    # Unusual text on purpose: digits and underscores, accents, letters whose lower case is a-z, quotes, dashes, emoji.
    pairs = [
        ("Café_no.7 — it's 50% “off”!", "cafe no 7: it's 50 % off"),
        ("100 \u212ailograms \u0130stanbul", "100 kilograms istanbul"),
        ("the cats were sitting 🙂", "a cat sits there 🙂 again"),
        ("…", "… ok"),
        (ENGLISH[0], ENGLISH_REFERENCES[0][1]),
    ]
    predictions, references = zip(*pairs, strict=False)
    types = ["rouge1", "rouge2", "rougeL"]
    default = RougeScorer(types, use_stemmer=use_stemmer)
    expected = [default.score(reference, prediction) for prediction, reference in pairs]
    scores = Rouge(use_stemmer=use_stemmer).compute(predictions=predictions, references=references)
    for name in types:
        assert scores[name] == pytest.approx(100 * sum(item[name].fmeasure for item in expected) / 5, abs=1e-6)


def test_rouge_tokens_of_mixed_text():
    text = "请给我的 iPhone12 充电，USB-C，100%！\u3000好的𠮷"
    expected = ["请", "给", "我", "的", "iphone12", "充", "电", "，", "usb", "c", "，", "100", "！", "好", "的", "𠮷"]
    assert CjkTokenizer().tokenize(text) == expected


def test_chinese_rouge_is_not_zero_and_counts_characters():
    scores = Rouge().compute(predictions=["我喜欢吃苹果。"], references=["我喜欢吃香蕉。"])
    assert scores["rouge1"] == pytest.approx(100 * 5 / 7)
    assert scores["rouge2"] == pytest.approx(100 * 3 / 6)
    assert scores["rougeL"] == pytest.approx(100 * 5 / 7)
    assert RougeScorer(["rouge1"]).score("我喜欢吃香蕉。", "我喜欢吃苹果。")["rouge1"].fmeasure == 0  # what it avoids


def test_distinct_counted_by_hand():
    # 7 tokens, 5 kinds. Bigrams: a b, b a, a b | c d, d e: 5, of which 4 kinds; none joins the two replies.
    assert Distinct().compute(predictions=["a b a b", "c d e"]) == {"distinct1": 5 / 7, "distinct2": 4 / 5}
    # 你 好 ， 你 好: 5 tokens, 3 kinds; 你好 好， ，你 你好: 4 bigrams, 3 kinds.
    assert Distinct().compute(predictions=["你好，你好"]) == {"distinct1": 3 / 5, "distinct2": 3 / 4}


def test_distinct_of_nothing_is_0_not_a_crash():
    assert Distinct().compute(predictions=["", "?!"]) == {"distinct1": 0.0, "distinct2": 0.0}


def test_perplexity():
    assert perplexity(0.0, 5) == 1.0
    assert perplexity(10 * math.log(50), 10) == pytest.approx(50)  # a uniform choice among 50 tokens
    assert perplexity(1e6, 1) == math.inf
    assert math.isnan(perplexity(math.nan, 3))
    with pytest.raises(ValueError, match="at least one"):
        perplexity(1.0, 0)


@pytest.mark.parametrize("convert", [int, str])
def test_accuracy_and_macro_f1_by_hand(convert):
    predictions, references = [[convert(x) for x in row] for row in ([0, 0, 1, 2], [0, 1, 1, 1])]
    both = evaluate.combine([Accuracy(), F1()]).compute(predictions=predictions, references=references)
    # F1: label 0 is 2/3, label 1 is 2*1/(1+3), label 2 was only predicted and counts as 0.
    assert both == {"accuracy": 0.5, "f1_macro": pytest.approx((2 / 3 + 1 / 2 + 0) / 3)}
    assert classification_report(predictions, references)["1"] == {
        "precision": 1.0,
        "recall": pytest.approx(1 / 3),
        "f1-score": 0.5,
        "support": 3,
    }


# ------------------------------------------------------------------------------------------- use as evaluate metrics


def test_metrics_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    combined = evaluate.combine([Bleu(), Rouge(), ChrF(), Distinct()])
    assert set(SCORES) <= set(combined.compute(predictions=ENGLISH, references=ENGLISH_REFERENCES))


def test_batches_add_up():
    rouge, distinct = Rouge(), Distinct()
    for prediction, reference in zip(ENGLISH, ENGLISH_REFERENCES, strict=False):
        rouge.add(prediction=prediction, reference=reference)
        distinct.add_batch(predictions=[prediction])
    assert rouge.compute() == Rouge().compute(predictions=ENGLISH, references=ENGLISH_REFERENCES)
    assert distinct.compute() == Distinct().compute(predictions=ENGLISH)


# ----------------------------------------------------------------------------------------------------- broken inputs

BROKEN = {
    "1 predictions but 2 references": (["a"], ["a", "b"]),
    "2 predictions but 1 references": (["a", "b"], ["a"]),
    "Nothing to score": ([], []),
    r"predictions\[1\] must be a string": (["a", None], ["a", "b"]),
    r"predictions\[0\] must be a string": ([["a"]], ["a"]),
    r"references\[1\] must be a list of at least one string": (["a", "b"], ["a", []]),
    r"references\[0\] must be a list of at least one string": (["a"], [5]),
    r"references\[0\]\[1\] must be a string": (["a"], [["a", None]]),
    "predictions must be a list": ("a", ["a"]),
    "references must be a list": (["a"], "a"),
    "references must be a list with": (["a"], None),
}


@pytest.mark.parametrize("metric", TEXT_METRICS)
@pytest.mark.parametrize("message", BROKEN)
def test_broken_input_is_rejected_and_leaves_the_metric_usable(metric, message):
    predictions, references = BROKEN[message]
    metric = metric()
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)
    usual = metric.compute(predictions=ENGLISH, references=ENGLISH_REFERENCES)
    assert usual == type(metric)().compute(predictions=ENGLISH, references=ENGLISH_REFERENCES)


@pytest.mark.parametrize("message", BROKEN)
def test_score_replies_rejects_broken_input(message):
    with pytest.raises(ValueError, match=message):
        score_replies(*BROKEN[message])


def test_score_replies_rejects_broken_languages():
    with pytest.raises(ValueError, match="2 predictions but 1 languages"):
        score_replies(ENGLISH, ENGLISH_REFERENCES, languages=["en"])
    with pytest.raises(ValueError, match=r"Unknown languages \['de'\]"):
        score_replies(ENGLISH, ENGLISH_REFERENCES, languages=["en", "de"])


@pytest.mark.parametrize("metric", [Accuracy, F1])
def test_label_metrics_reject_broken_input(metric):
    with pytest.raises(ValueError, match="1 predictions but 2 references"):
        metric().compute(predictions=[1], references=[1, 0])
    with pytest.raises(ValueError, match="Nothing to score"):
        metric().compute(predictions=[], references=[])


def test_distinct_rejects_broken_input():
    with pytest.raises(ValueError, match="at least one string"):
        Distinct().compute(predictions=[])
    with pytest.raises(ValueError, match=r"predictions\[1\] must be a string"):
        Distinct().compute(predictions=["a", None])


# ----------------------------------------------------------------------------------------------------- empty replies


def assert_empty_replies_cost_score(bleu, chrf, rouge):
    """A silent model must not score as well as one that answers: true for each metric, or this fails."""
    for metric, name in ((bleu, "bleu"), (chrf, "chrf"), (rouge, "rougeL")):
        for nothing in ("", "  \n"):
            score = metric.compute(predictions=[ENGLISH[0], nothing], references=[ENGLISH[0], ENGLISH[0]])[name]
            assert 0 < score < 60


def test_empty_replies_count_as_0():
    assert_empty_replies_cost_score(Bleu(), ChrF(), Rouge())
    half = Rouge().compute(predictions=[ENGLISH[0], ""], references=[ENGLISH[0], ENGLISH[0]])
    assert half == {"rouge1": 50.0, "rouge2": 50.0, "rougeL": 50.0}
    # The brevity penalty of BLEU: 8 tokens where 16 were due.
    bleu = Bleu().compute(predictions=[ENGLISH[0], ""], references=[ENGLISH[0], ENGLISH[0]])
    assert bleu["bleu"] == pytest.approx(100 * math.exp(1 - 16 / 8))


@pytest.mark.parametrize("broken", TEXT_METRICS)
def test_a_metric_that_drops_empty_replies_is_caught(broken):
    class Dropping(broken):
        def _compute(self, predictions, references):
            kept = [(p, r) for p, r in zip(predictions, references, strict=False) if p.strip()]
            return super()._compute([p for p, _ in kept], [r for _, r in kept])

    metrics = [Dropping() if metric is broken else metric() for metric in TEXT_METRICS]
    bleu, chrf, rouge = metrics[0], metrics[1], metrics[2]
    with pytest.raises(AssertionError):
        assert_empty_replies_cost_score(bleu, chrf, rouge)


def test_only_empty_replies_score_0_everywhere():
    result = score_replies(["", " "], [ENGLISH_REFERENCES[0], CHINESE_REFERENCES[0]])
    for group in ("all", "en", "zh"):
        assert [result[group][name] for name in SCORES] == [0] * len(SCORES)
    assert [(result[group]["n"], result[group]["empty"]) for group in ("all", "en", "zh")] == [(2, 2), (1, 1), (1, 1)]


# --------------------------------------------------------------------------------------------------- both languages


@pytest.mark.parametrize(
    "text, language",
    [
        ("Where is my order?", "en"),
        ("我的订单在哪里？", "zh"),
        ("我的 iPhone 12 在哪里？", "zh"),
        ("The restaurant is called 全聚德 and it opens at ten.", "en"),
        ("請打開收音機。", "zh"),
        ("", "en"),
        ("010-84273030", "en"),
        ("Où est ma commande ?", "en"),
    ],
)
def test_detect_language(text, language):
    assert detect_language(text) == language


@pytest.mark.parametrize(
    "replies, references, language, tokenize",
    [(ENGLISH, ENGLISH_REFERENCES, "en", "13a"), (CHINESE, CHINESE_REFERENCES, "zh", "zh")],
)
def test_one_language_gives_the_plain_scores(replies, references, language, tokenize):
    result = score_replies(replies, references)
    bleu, chrf = Bleu(tokenize=tokenize), ChrF()
    plain = evaluate.combine([bleu, Rouge(), chrf, Distinct()]).compute(predictions=replies, references=references)
    assert set(result) == {"all", language, "signature"}
    assert result["all"] == result[language] == {**{name: plain[name] for name in SCORES}, "n": 2, "empty": 0}
    assert plain["bleu_signature"] in result["signature"] and plain["chrf_signature"] in result["signature"]
    assert all(plain[name] > 0 for name in SCORES)


def test_a_mixed_set_holds_the_scores_of_each_language_and_one_corpus_of_both():
    replies = [ENGLISH[0], CHINESE[0], ENGLISH[1], CHINESE[1]]
    references = [ENGLISH_REFERENCES[0], CHINESE_REFERENCES[0], ENGLISH_REFERENCES[1], CHINESE_REFERENCES[1]]
    result = score_replies(replies, references)
    assert list(result) == ["all", "en", "zh", "signature"]
    assert result["en"] == score_replies(ENGLISH, ENGLISH_REFERENCES)["en"]
    assert result["zh"] == score_replies(CHINESE, CHINESE_REFERENCES)["zh"]
    # One corpus: the n-gram counts and lengths of both languages together, not the mean of two BLEU scores.
    en = Bleu().compute(predictions=ENGLISH, references=ENGLISH_REFERENCES)
    zh = Bleu(tokenize="zh").compute(predictions=CHINESE, references=CHINESE_REFERENCES)
    counts, totals = ([a + b for a, b in zip(en[key], zh[key], strict=False)] for key in ("counts", "totals"))
    lengths = (en[key] + zh[key] for key in ("sys_len", "ref_len"))
    assert result["all"]["bleu"] == pytest.approx(sacrebleu.BLEU.compute_bleu(counts, totals, *lengths).score)
    for name in ("rouge1", "rouge2", "rougeL"):
        assert result["all"][name] == pytest.approx((result["en"][name] + result["zh"][name]) / 2)
    assert (result["all"]["n"], result["en"]["n"], result["zh"]["n"]) == (4, 2, 2)
    assert "tok:13a+zh" in result["signature"] and sacrebleu.__version__ in result["signature"]
    assert json.loads(json.dumps(result)) == result


def test_the_language_is_that_of_the_reference_not_of_the_reply():
    result = score_replies(["I do not know."], ["我不知道。"])
    assert set(result) == {"all", "zh", "signature"}


def test_given_languages_win():
    result = score_replies(["010-84273030。"], ["010-84273030。"], languages=["zh"])
    assert set(result) == {"all", "zh", "signature"}
    assert result["zh"]["bleu"] == pytest.approx(100)  # 010 - 84273030 。


# ---------------------------------------------------------------------------------------------------- golden figures


def check_bleu(case):
    # "use_effective_order" is the name that sacrebleu gives this setting in its functions.
    options = {"effective_order" if k == "use_effective_order" else k: v for k, v in case["args"].items()}
    result = Bleu(**options).compute(predictions=case["hyps"], references=case["refs"])
    for name, value in case["expected"].items():
        assert result[name] == pytest.approx(value, abs=case["tol"]), name
    assert result["bleu_signature"] == case.get("signature", result["bleu_signature"])


def check_chrf(case):
    options = {k: v for k, v in case["args"].items() if k != "metric"}
    result = ChrF(**options).compute(predictions=case["hyps"], references=case["refs"])
    assert result["chrf"] == pytest.approx(case["expected"]["chrf"], abs=case["tol"])


def check_rouge(case):
    metric = Rouge(rouge_types=[case["args"]["type"]], use_stemmer=case["args"]["use_stemmer"])
    score = metric.compute(predictions=[case["hyp"]], references=[case["ref"]])[case["args"]["type"]]
    assert score == pytest.approx(100 * case["expected"]["fmeasure"], abs=100 * case["tol"])


def check_rouge_multi(case):
    hyps, refs = ([case["hyp"]], [case["refs"]]) if "hyp" in case else (case["hyps"], case["refs"])
    result = Rouge().compute(predictions=hyps, references=refs)
    expected = {name.removesuffix("_mean"): v for name, v in case["expected"].items() if not name.endswith("_per_item")}
    assert {name: result[name] for name in expected} == pytest.approx({name: 100 * v for name, v in expected.items()})


def check_rouge_zh(case):
    result = Rouge().compute(predictions=[case["hyp"]], references=[case["ref"]])
    expected = {name: 100 * score["f"] for name, score in case["expected"]["rouge_score"].items()}
    assert result == pytest.approx(expected, abs=100 * case["tol"])


def check_distinct(case):
    n = case["args"]["n"]
    expected = case["expected"]["per_ngrams" if case["args"]["level"] == "corpus" else "distinct"]
    assert Distinct().compute(predictions=case["sentences"])[f"distinct{n}"] == pytest.approx(expected)


def check_tokenizer(case):
    for tokenize, tokens in case["expected"].items():
        bleu = Bleu(tokenize=tokenize).compute(predictions=[case["text"]], references=[case["text"]])
        tokenized = Bleu(tokenize="none", force=True).compute(predictions=[tokens], references=[tokens])
        assert bleu["totals"] == tokenized["totals"] and bleu["sys_len"] == len(tokens.split())
    # What score_replies does with a Chinese item: its tokens against the expected ones.
    assert score_replies([case["text"]], [case["expected"]["zh"]], ["zh"])["zh"]["bleu"] == pytest.approx(100)


def check_classification(case):
    report = classification_report(case["y_pred"], case["y_true"])
    names = dict(enumerate(case["args"].get("target_names", [])))
    named = {names.get(int(key), key) if key.isdigit() else key: value for key, value in report.items()}
    expected = case["expected"]
    assert named.keys() == expected["report_dict"].keys()
    for key, value in expected["report_dict"].items():
        assert named[key] == pytest.approx(value, abs=case["tol"])
    scores = evaluate.combine([Accuracy(), F1()]).compute(predictions=case["y_pred"], references=case["y_true"])
    assert scores == pytest.approx({name: expected[name] for name in ("accuracy", "f1_macro")}, abs=case["tol"])


DOG = {
    "hyps": ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."],
    "refs": [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ],
    "tol": 1e-6,
}
PERL_TEXT = {
    "hyp": "rFDJCRtion Ht-LM EKtDXkME,yz'RBr q'wer wrojNbN wL,b .a-'XdQggyFl jB-RPP'iyOIcUxi",
    "ref": "ZfbCUIUuePaiLVUlCaUXxkpu XPeWing tUHfPMuZ',-Xd Y BrUgVJing M-HV.-DgdDaY.rFDJCRing Ht-LM EKBDXkME,yz'RBr "
    "q'wtion wIojNbN wL,b .a-'XdQggyFl jB-RPP'iyOIcUxer tKM L",
    "tol": 1e-5,
}
CARRIED = [
    # published: sacrebleu 2.6.0 sdist test/test_bleu.py (Apache-2.0)
    (check_bleu, {"id": "bleu", **DOG, "args": {}, "expected": {"bleu": 48.530827}}),
    (check_bleu, {"id": "bleu-none", **DOG, "args": {"tokenize": "none"}, "expected": {"bleu": 49.1919566}}),
    (check_bleu, {"id": "bleu-order", **DOG, "args": {"max_ngram_order": 3}, "expected": {"bleu": 53.93}, "tol": 5e-3}),
    # published: huggingface/evaluate metrics README @ a7dd3383 (Apache-2.0)
    (
        check_bleu,
        {
            "id": "bleu-evaluate",
            "args": {"tokenize": "13a"},
            "hyps": ["hello there general kenobi", "on our way to ankh morpork"],
            "refs": [["hello there general kenobi", "hello there !"], ["goodbye ankh morpork", "ankh morpork"]],
            "expected": {"bleu": 39.76353643835252, "counts": [6, 4, 2, 1], "totals": [10, 8, 6, 4], "bp": 1.0},
            "tol": 1e-6,
        },
    ),
    # published: sacrebleu 2.6.0 sdist test/test_chrf.py (Apache-2.0)
    (
        check_chrf,
        {
            "id": "chrf",
            "args": {"char_order": 6, "word_order": 0, "beta": 3, "eps_smoothing": True},
            "hyps": ["a b c"],
            "refs": [["abc"]],
            "expected": {"chrf": 50.0},
            "tol": 1e-4,
        },
    ),
    # published: rouge_score 0.1.2 sdist rouge_score/rouge_scorer_test.py (Apache-2.0); texts: google-research
    # rouge/testdata; the figures came from the original Perl ROUGE-1.5.5
    *(
        (check_rouge, {"id": name, **PERL_TEXT, "args": {"type": name, "use_stemmer": False}, "expected": expected})
        for name, expected in (("rouge1", {"fmeasure": 0.51163}), ("rouge2", {"fmeasure": 0.39024}))
    ),
    # published: rouge_score 0.1.2 sdist rouge_score/rouge_scorer_test.py (Apache-2.0)
    (
        check_rouge_multi,
        {
            "id": "rouge-multi",
            "hyp": "text first",
            "refs": ["first text", "first something"],
            "expected": {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.5},
        },
    ),
    # computed by rouge_score 0.1.2 with a whitespace tokenizer over characters; sentences: tatoeba.org #429244 and
    # #471266 (fucongcong), translations of #16501 (CK), CC BY 2.0 FR
    (
        check_rouge_zh,
        {
            "id": "rouge-zh",
            "hyp": "你为什么来这儿？",
            "ref": "你们来这儿干嘛？",
            "expected": {"rouge_score": {"rouge1": {"f": 0.625}, "rouge2": {"f": 2 / 7}, "rougeL": {"f": 0.625}}},
            "tol": 1e-6,
        },
    ),
    # published: neural-dialogue-metrics/Distinct-N distinct_n/test.py (MIT)
    (
        check_distinct,
        {
            "id": "distinct-1",
            "args": {"n": 1, "level": "sentence"},
            "sentences": ["the the the the the"],
            "expected": {"distinct": 0.2},
        },
    ),
    # counted by hand on the sentences of the same test: 15 kinds of bigram, 18 bigrams, 22 words
    (
        check_distinct,
        {
            "id": "distinct-2",
            "args": {"n": 2, "level": "corpus"},
            "sentences": [
                "the cat sat on the mat",
                "mat the on sat cat the",
                "i do not know",
                "Sorry but i do not know",
            ],
            "expected": {"per_ngrams": 15 / 18},
        },
    ),
    # computed by sacrebleu 2.6.0 TokenizerZh / Tokenizer13a on a CrossWOZ test turn (Apache-2.0)
    (
        check_tokenizer,
        {
            "id": "tokenizer-zh",
            "text": "周一至周日 10:00-22:00。",
            "expected": {"zh": "周 一 至 周 日 10 : 00 - 22 : 00 。", "13a": "周一至周日 10 : 00 - 22 : 00。"},
        },
    ),
]


@pytest.mark.parametrize("check, case", [pytest.param(*carried, id=carried[1]["id"]) for carried in CARRIED])
def test_golden(check, case):
    check(case)


def test_a_golden_case_with_a_wrong_figure_fails():
    with pytest.raises(AssertionError):
        check_bleu({**DOG, "args": {}, "expected": {"bleu": 48.54}})


# ------------------------------------------------------------- the larger collection, when it lies beside the checkout

SHARED = Path(__file__).resolve().parents[2] / "shared"


def read_shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {name} beside the checkout")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# File -> (its check, which of its cases speak of what these metrics compute).
APPLICABLE = {
    "bleu_corpus": (check_bleu, lambda case: "hyps" in case),  # the other case starts from counts, not from text
    "bleu_zh": (check_bleu, lambda case: case["args"].get("metric") is None),
    "chrf": (check_chrf, lambda case: True),
    "rouge": (check_rouge, lambda case: True),
    "rouge_multi": (check_rouge_multi, lambda case: True),
    "rouge_zh_char": (check_rouge_zh, lambda case: "rouge_score" in case["expected"]),
    # Distinct here is over the corpus and per n-gram; "number of words" is the same figure for n = 1 only.
    "distinct": (check_distinct, lambda c: c["args"]["level"] == "corpus" or c["id"] == "distinct-0"),
    "tokenizer_zh": (check_tokenizer, lambda case: True),
    "classification": (check_classification, lambda case: "report_dict" in case["expected"]),
}


@pytest.mark.parametrize("name", APPLICABLE)
def test_shared_golden(name):
    check, applies = APPLICABLE[name]
    cases = [case for case in read_shared(f"golden/{name}.jsonl") if applies(case)]
    assert cases
    for case in cases:
        check(case)


def test_shared_golden_chinese_chrf():
    cases = [case for case in read_shared("golden/bleu_zh.jsonl") if case["args"].get("metric") == "chrF2"]
    assert cases
    for case in cases:
        check_chrf(case)


def test_bleu_equals_the_official_e2e_script():
    """E2E challenge outputs: lower-cased BLEU over all references is the challenge's own figure, to 4 decimals."""
    references, compared = {}, 0
    for system in read_shared("golden/e2e/systems.jsonl"):
        name = system["refs_file"]
        if not (SHARED / "data" / name).exists():
            continue
        if name not in references:
            references[name] = [row["refs"] for row in read_shared(f"data/{name}")]
        bleu = Bleu(lowercase=True, force=True).compute(predictions=system["hyps"], references=references[name])["bleu"]
        official = system["published_official_scripts"] or system["computed_with_upstream_python_code"]
        assert round(bleu / 100, 4) == round(official["bleu"], 4), system["id"]
        compared += 1
    if not compared:
        pytest.skip("no E2E references beside the checkout")
