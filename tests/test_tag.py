"""The task tag: spans, what is labelled token by token, bad rows, and runs from the recipe to the scores."""

import json
import runpy
import sys

import pytest
import torch
from conftest import ROOT, SHARED, tiny_tokenizer
from test_methods import run_recipe
from transformers import AutoModelForTokenClassification

from recipes.common import data, metrics, models
from recipes.common.chat import IGNORE
from recipes.common.errors import UserError
from recipes.common.tasks import tag

ROWS = [
    {"tokens": ["Where", "is", "order", "MW204518", "?"], "tags": ["O", "O", "O", "B-order", "O"]},
    {"tokens": list("我想退货到北京"), "tags": ["O"] * 5 + ["B-city", "I-city"]},
    {"tokens": ["Are", "you", "open", "in", "New", "York", "?"], "tags": ["O", "O", "O", "O", "B-city", "I-city", "O"]},
    {"tokens": list("订单号是五"), "tags": ["O", "O", "O", "O", "B-order"]},
]
LABELS = ["O", "B-city", "I-city", "B-order", "I-order"]


# Spans and their scores


def test_spans():
    assert metrics.spans(["B-a", "I-a", "B-a", "O", "I-b", "I-a", "I-a"]) == [("a", 0, 2), ("a", 2, 3), ("b", 4, 5), ("a", 5, 7)]
    assert metrics.spans(["O", "B-a-b", "I-a-b"]) == [("a-b", 1, 3)] and metrics.spans(["O"]) == []


def test_span_report_of_seqevals_readme():  # seqeval 1.2.2, README (MIT): the figures that it prints for these tags
    right = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    report = metrics.span_report([["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]], right)
    assert report["micro avg"] == {"precision": 0.5, "recall": 0.5, "f1-score": 0.5, "support": 2} and report["accuracy"] == 0.8
    assert report["MISC"]["f1-score"] == 0 and report["PER"]["f1-score"] == 1 and report["macro avg"]["f1-score"] == 0.5
    assert metrics.span_report(right, right)["micro avg"]["f1-score"] == 1


def test_a_shorter_row_is_refused():
    with pytest.raises(ValueError, match="row 0 has 1 predicted tags but 2"):
        metrics.span_report([["O"]], [["O", "O"]])


def test_all_cases_of_seqeval():
    path = SHARED / "golden/seqeval.jsonl"
    if not path.is_file():
        pytest.skip("the shared cases are not here")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    scored = [case for case in cases if "y_true" in case]
    for case in scored:
        report = metrics.span_report(case["y_pred"], case["y_true"])
        found = {"accuracy": report["accuracy"], "f1": report["micro avg"]["f1-score"],
                 **{key: report["micro avg"][key] for key in ("precision", "recall")}}
        assert {key: found[key] for key in case["expected"]} == pytest.approx(case["expected"], abs=case["tol"]), case["id"]
    flat = [case for case in cases if "tags" in case and isinstance(case["tags"][0], str)]
    for case in flat:
        assert [[kind, start, end - 1] for kind, start, end in metrics.spans(case["tags"])] == case["expected"]["entities_inclusive_end"]
    assert scored and flat


# What is labelled


def encode(rows, tokenizer, **options):
    return tag.encode(rows, "rows.jsonl", tokenizer=tokenizer, labels=LABELS, **{"max_length": 64, **options})


def labelled(row, tokenizer, **options):
    """(text of the labelled token, tag) of each labelled token of one row."""
    [feature], _ = encode([row], tokenizer, **options)
    assert len(feature["labels"]) == len(feature["input_ids"])
    return [(tokenizer.convert_ids_to_tokens(i), LABELS[label]) for i, label in
            zip(feature["input_ids"], feature["labels"], strict=True) if label != IGNORE]


def test_an_encoders_label_stands_at_the_first_token_of_each_word():
    tokenizer = tiny_tokenizer("bert")
    found = labelled({"tokens": ["Where", "openness", "order"], "tags": ["O", "B-city", "B-order"]}, tokenizer)
    first = [tokenizer.tokenize(word)[0] for word in ("Where", "openness", "order")]
    assert found == list(zip(first, ["O", "B-city", "B-order"], strict=True))
    [feature], _ = encode([ROWS[1]], tokenizer)
    assert feature["labels"] == [IGNORE, 0, 0, 0, 0, 0, 1, 2, IGNORE] and feature["words"] == list(range(7))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("row", ROWS, ids=["en", "zh", "en2", "zh2"])
def test_byte_level_tokens_are_those_of_running_text(kind, row):
    tokenizer = tiny_tokenizer(kind)
    text = "".join(tag.spaced(row["tokens"]))
    [feature], _ = encode([row], tokenizer, last=True)
    assert tokenizer.decode(feature["input_ids"]) == text
    assert len(text.split()) == (len(row["tokens"]) if text.isascii() else 1)
    assert [LABELS[label] for label in feature["labels"] if label != IGNORE] == row["tags"]
    # The label is at the word's last token: what is read up to there ends with the word.
    places = [at for at, label in enumerate(feature["labels"]) if label != IGNORE]
    assert all(tokenizer.decode(feature["input_ids"][: at + 1]).endswith(word) for at, word in zip(places, row["tokens"], strict=True))


def test_words_without_the_blank_would_be_other_tokens():
    tokenizer = tiny_tokenizer("gpt2")
    assert tag._blanks(tokenizer) and not tag._blanks(tiny_tokenizer("bert"))
    assert tokenizer(ROWS[0]["tokens"], is_split_into_words=True)["input_ids"] != tokenizer(" ".join(ROWS[0]["tokens"]))["input_ids"]


def test_a_word_without_tokens_does_not_shift_the_labels():
    row = {"tokens": ["Where", "\x00", "order"], "tags": ["O", "B-city", "B-order"]}
    [feature], counts = encode([row], tiny_tokenizer("bert"))
    assert feature["words"] == [0, 2] and [label for label in feature["labels"] if label != IGNORE] == [0, 3]
    assert counts["supervised"] == 2 and any("1 word is nothing to the tokenizer" in sentence for sentence in counts["sentences"])


def test_a_row_that_is_too_long_is_counted():
    [feature], counts = encode([ROWS[1]], tiny_tokenizer("bert"), max_length=5)
    assert feature["words"] == [0, 1, 2] and counts["shortened"] == 1
    assert counts["sentences"] == ["1 row exceeds --max_length 5: at the end, 4 words are predicted as O"]
    assert encode(ROWS, tiny_tokenizer("gpt2"), last=True)[1]["sentences"] == []


def test_words_that_the_tokenizer_does_not_know_are_counted():
    tokenizer = tiny_tokenizer("bert")
    rows = [{"tokens": ["order", "龘", "Friday", "龘"], "tags": ["O", "B-city", "O", "O"]}, {"tokens": ["order"], "tags": ["O"]}]
    assert encode(rows, tokenizer)[1]["sentences"] == [
        "2 of 5 words are unknown to the tokenizer, and the same [UNK] to the model: it goes by what stands around them"]
    assert encode(rows[1:], tokenizer)[1]["sentences"] == []


def test_half_a_word_is_not_labelled():
    tokenizer = tiny_tokenizer("gpt2")
    row = {"tokens": ["Where", "MW204518"], "tags": ["O", "B-order"]}
    length = len(encode([row], tokenizer, last=True)[0][0]["input_ids"])
    assert encode([row], tokenizer, last=True, max_length=length - 1)[0][0]["words"] == [0]


def test_stray_tags_and_unknown_types_are_counted():
    rows = [{"tokens": ["in", "York", "x"], "tags": ["O", "I-city", "I-order"]}, {"tokens": ["x"], "tags": ["B-phone"]}]
    features, counts = encode(rows, tiny_tokenizer("bert"))
    assert "2 tags I-... continue no span" in counts["sentences"][0]
    assert "1 word has a type that the train rows lack (phone)" in counts["sentences"][1]
    assert features[1]["labels"] == [IGNORE, 0, IGNORE]


def test_no_word_within_reach_is_refused():
    with pytest.raises(UserError, match="raise --max_length"):
        encode([{"tokens": ["MW204518MW204518"], "tags": ["O"]}], tiny_tokenizer("gpt2"), max_length=2, last=True)


@pytest.mark.parametrize("row, wrong", [
    ({"tokens": ["a"]}, 'no column "tags"'),
    ({"tokens": "ab", "tags": ["O", "O"]}, '"tokens" must be a list'),
    ({"tokens": ["a", " "], "tags": ["O", "O"]}, '"tokens" must be a string with visible text'),
    ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens but 1 tags"),
    ({"tokens": ["a"], "tags": ["city"]}, "is not IOB2"),
    ({"tokens": ["a"], "tags": ["B-"]}, "is not IOB2"),
])
def test_bad_rows(row, wrong):
    assert wrong in data.check_tag(row)
    assert all(data.check_tag(good) is None for good in ROWS)


def test_rows_without_spans_are_refused():
    with pytest.raises(UserError, match="no tag but O"):
        tag.facts([{"tokens": ["a"], "tags": ["O"]}], None)
    assert list(tag.facts(ROWS, None)["labels"]) == LABELS


# From the recipe to the scores


def evaluate(monkeypatch, *flags):
    """Run scripts/evaluate.py in this process."""
    monkeypatch.setattr(sys, "argv", ["scripts/evaluate.py", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/evaluate.py"), run_name="__main__")
    assert not ended.value.code


@pytest.mark.parametrize("recipe, kind", [("full", "bert"), ("lora", "bert"), ("lora", "gpt2"), ("full", "llama")])
def test_a_run_learns_its_rows_and_is_scored(recipe, kind, tiny, write_jsonl, tmp_path, monkeypatch):
    for split in ("train", "dev", "test"):
        write_jsonl(ROWS, f"slots/{split}.jsonl")
    run = tmp_path / "run"
    trainer = run_recipe(recipe, tiny(kind), tmp_path / "slots", run, "--task", "tag", "--num_train_epochs", "200", "--learning_rate",
                         "0.01", "--per_device_train_batch_size", "4", "--eval_strategy", "no", "--save_strategy", "no")
    evaluate(monkeypatch, "--run", run, "--dtype", "float32")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["metrics"]["dev_f1"] == 100
    scores = record["evaluation"]["test"]
    table = {row["language"]: dict(zip(scores["columns"], row["values"], strict=True)) for row in scores["table"]}
    assert table.keys() == {"en", "zh", "all"} and table["all"]["F1"] == 100
    assert table["all"]["loss"] == pytest.approx(record["metrics"]["dev_loss"], rel=1e-3)  # what was saved is what was trained
    assert scores["report"]["city"]["support"] == 2
    lines = [json.loads(line) for line in (run / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line[recipe] for line in lines] == [row["tags"] for row in ROWS]
    # The loss is the mean of transformers' own loss over the labelled tokens.
    model = models.load_run(run, torch.float32, AutoModelForTokenClassification, trainer.task.config).eval()
    batch = trainer.task.collate(list(trainer.task.dev))
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(record["metrics"]["dev_loss"], rel=1e-3)


def test_words_without_a_prediction_count_as_missed(tiny, write_jsonl, tmp_path, monkeypatch):
    for split in ("train", "dev", "test"):
        write_jsonl(ROWS, f"slots/{split}.jsonl")
    run = tmp_path / "run"
    run_recipe("full", tiny("bert"), tmp_path / "slots", run, "--task", "tag", "--num_train_epochs", "60", "--learning_rate", "0.01",
               "--per_device_train_batch_size", "4", "--eval_strategy", "no", "--save_strategy", "no")
    long = {"tokens": [*ROWS[1]["tokens"]] * 40, "tags": [*ROWS[1]["tags"]] * 40}
    lost = {"tokens": ["\ufffd"], "tags": ["O"], "language": "en"}  # nothing to the tokenizer: without a loss
    evaluate(monkeypatch, "--run", run, "--data", write_jsonl([lost, long], "long.jsonl"), "--latency", "2")
    [scores] = json.loads((run / "run.json").read_text(encoding="utf-8"))["evaluation"].values()
    assert scores["report"]["city"]["support"] == 40 and scores["report"]["city"]["recall"] <= 158 // 7 / 40
    assert scores["latency"]["full"] > 0  # of the row that can be read
    assert [row["values"][0] == "nan" for row in scores["table"]] == [True, False, False]
    assert "are predicted as O" in scores["notes"][0] and not any("--base" in note for note in scores["notes"])


def test_where_the_untuned_model_has_no_score_base_says_so(tiny, write_jsonl, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run_recipe("lora", tiny("gpt2"), write_jsonl(ROWS), run, "--task", "tag", "--max_steps", "1")
    evaluate(monkeypatch, "--run", run, "--base")
    assert "note: --base adds no line: the untuned model has no head for these tags" in capsys.readouterr().out


def test_class_weights_reach_the_loss(tiny, write_jsonl, tmp_path):
    """A column that is no argument of the model's, as balanced classes' weights, must get through to the collator."""
    rows = [{"text": f"{word} order", "label": label} for word, label in (("Where", "a"), ("Yes", "a"), ("Thank", "a"), ("open", "b"))]
    trainers = [run_recipe("full", tiny("bert"), write_jsonl(rows, "rows.jsonl"), tmp_path / weights, "--task", "classify", "--max_steps",
                           "1", "--save_strategy", "no", "--class_weights", weights) for weights in ("none", "balanced")]
    assert ["weights" in next(iter(trainer.get_train_dataloader()))[0] for trainer in trainers] == [False, True]
