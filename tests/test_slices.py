"""Scores of parts of the rows, and which labels are taken for which."""

import json

import pytest
from test_cli import call
from test_methods import run_recipe

from recipes.common import evaluation, metrics

TEXTS = ["Yes, until nine.", "好的，请告诉我订单号。", "", "不客气，还有别的问题吗？", "You are very welcome here."]
REFERENCES = ["Yes, until ten.", "好的，请告诉我您的订单号。", "It arrives.", ["不客气。", "不客气，还有问题吗？"], "You are welcome."]
LANGUAGES = ["en", "zh", "en", "zh", "en"]
ROWS = [{"messages": [{"role": "system", "content": "You answer for a shop."},
                      {"role": "user", "content": "Where is it?", "intent": "order_status", "sentiment": "angry"},
                      {"role": "assistant", "content": "What is its number?"},
                      {"role": "user", "content": "MW204518", "intent": "inform", "sentiment": "neutral"},
                      {"role": "assistant", "content": "It arrives on Friday between nine and ten in the morning, I am told."}]},
        {"messages": [{"role": "user", "content": "我想退货。", "intent": "return_item", "sentiment": "neutral"},
                      {"role": "assistant", "content": "好的。"}]}]


@pytest.mark.parametrize("at", [[0, 1, 2, 3, 4], [0, 2], [3], [2], [4, 1]])
def test_a_part_is_scored_like_a_test_set_of_its_own(at):
    whole = metrics.score_replies(*([values[i] for i in at] for values in (TEXTS, REFERENCES, LANGUAGES)))["all"]
    found = metrics.part_scorer(TEXTS, REFERENCES, LANGUAGES)(at)
    assert found == pytest.approx({key: whole[key] for key in ("bleu", "rougeL", "chrf")})


def test_slices_cut_by_each_key_and_sort_by_number():
    keys = [{"turn": t, "intent": "a"} | ({"mood": "b"} if t == "1" else {}) for t in ("10", "2", "1", "2", "5+")]
    found = evaluation.slices(keys, ["positions"], {"m": lambda at: [at], "n": lambda at: [len(at)]})
    assert [(row["by"], row["value"], row["model"], row["count"], row["values"]) for row in found["table"]] == [
        ("turn", "1", "m", 1, [[2]]), ("turn", "1", "n", 1, [1]), ("turn", "2", "m", 2, [[1, 3]]), ("turn", "2", "n", 2, [2]),
        ("turn", "5+", "m", 1, [[4]]), ("turn", "5+", "n", 1, [1]), ("turn", "10", "m", 1, [[0]]), ("turn", "10", "n", 1, [1])]


@pytest.mark.parametrize(("text", "expected"), [("", "1-10"), ("one two", "1-10"), ("字" * 10, "1-10"), ("字" * 11, "11-20"),
                                                ("word " * 40, "21-40"), ("word " * 41, "41+")])
def test_length_classes(text, expected):
    assert metrics.length_class(text) == expected


def test_a_confusion_matrix_holds_what_is_confused():
    right, predicted = ["a", "a", "b", "c", "c", "d"], ["a", "b", "b", "a", "a", "d"]
    assert metrics.confusion_matrix(predicted, right) == {
        "labels": ["a", "b", "c", "d"], "matrix": [[1, 1, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1]]}
    assert metrics.confusion_matrix(predicted, right, most=2) == {"labels": ["a", "c"], "matrix": [[1, 0], [2, 0]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sliced")
    for split in ("train", "dev", "test"):
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS * 2), encoding="utf-8")
    return out


@pytest.mark.parametrize(("kind", "flags", "unit", "ways"), [
    ("llama", (), "replies", {"intent": 3, "sentiment": 2, "turn": 2, "language": 2, "reply_length": 2}),
    ("bert", ("--task", "classify", "--label", "intent"), "rows", {"sentiment": 2, "turn": 2, "language": 2}),
])
def test_evaluate_shows_them(kind, flags, unit, ways, tiny, folder, tmp_path):
    run = tmp_path / "run"
    run_recipe("full", tiny(kind), folder, run, "--max_steps", "1", *flags)
    result = call("scripts/evaluate.py", "--run", run, "--max_new_tokens", "4", "--slices")
    assert result.code == 0, result.err
    scores = json.loads((run / "run.json").read_text(encoding="utf-8"))["evaluation"]["test"]
    found = {}
    for row in scores["slices"]["table"]:
        found.setdefault(row["by"], []).append(row["count"])
    assert {by: len(counts) for by, counts in found.items()} == ways
    assert all(sum(counts) == 6 for counts in found.values())
    assert "by sentiment" in result.out and unit in result.out
    assert "by sentiment" not in call("scripts/evaluate.py", "--run", run, "--max_new_tokens", "4").out


def test_intervals_hold_the_scores_of_the_table(tiny, folder, tmp_path):
    run = tmp_path / "run"
    run_recipe("full", tiny("llama"), folder, run, "--max_steps", "2", "--learning_rate", "0.02")
    assert call("scripts/evaluate.py", "--run", run, "--base", "--max_new_tokens", "8", "--dtype", "float32").code == 0
    scores = json.loads((run / "run.json").read_text(encoding="utf-8"))["evaluation"]["test"]
    for row in scores["table"][-2:]:
        values = dict(zip(scores["columns"], row["values"], strict=True))
        found = scores["intervals"][row["model"]]
        assert found.keys() == {"loss", "perplexity", "BLEU", "chrF", "ROUGE-L"}
        for title, interval in found.items():
            assert interval["value"] == pytest.approx(values[title]) and interval["low"] <= interval["value"] <= interval["high"]
        assert found["loss"]["low"] < found["loss"]["high"]


def test_a_result_of_few_items_shows_each_of_them_once():
    assert evaluation.spread(5, 20) == [0, 1, 2, 3, 4] and evaluation.spread(9, 3) == [0, 4, 8]
    assert evaluation.spread(1, 3) == [0] and evaluation.spread(0, 3) == []
