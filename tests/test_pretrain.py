"""The task pretrain: which token is predicted where, which words are masked when, pairs of sentences, models from scratch, whole runs."""

import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DIALOGUES, SHARED
from test_cli import call
from test_methods import run_recipe
from test_resume import Killed, curve, same, trained
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    TrainerCallback,
)

from recipes.common import args, data, evaluation, losses, models, runs, scratch, tasks
from recipes.common.chat import IGNORE
from recipes.common.errors import UserError
from recipes.common.scoring import dataset_outputs, mean_loss
from recipes.common.tasks import pretrain
from recipes.common.trainer import RecipeTrainer

ROWS = [{"text": "Where is my order? It was sent on Friday. The parcel has a number."}, {"text": "我想退货。请告诉我订单号。谢谢！"},
        {"text": "Are you open? Yes, until nine. Thank you! You are welcome."},
        {"text": "我的卡丢了。我马上为您冻结这张卡。不客气，还有别的问题吗？"}, {"text": "One."}]


def task_for(folder, **options):
    shared = args.SharedArguments(task="pretrain", **options)
    source = models.resolve(str(folder))
    shared.max_length = shared.max_length or 96
    return pretrain.make(shared, source, models.load_tokenizer(source), {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("texts")
    for split in ("train", "dev", "test"):
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return out


# ------------------------------------------------------------------------------------------------------------------- rows


def test_a_dialogue_becomes_a_text_with_a_line_for_each_turn():
    assert pretrain.rows([{**DIALOGUES[1], "language": "zh", "extra": 1}, ROWS[0]], None) == [
        {"text": "我想退货。\n好的，请告诉我订单号。", "language": "zh"}, ROWS[0]]


def test_plain_text_questions_and_dialogues_are_read(tmp_path):
    for name, text in (("a.txt", "One line.\n\n第二行。\n"), ("b.jsonl", json.dumps(DIALOGUES[0])), ("c.csv", "prompt,response\nHi,Yo\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = [pretrain.rows(data.read(tmp_path / name, pretrain.check(None)).rows, None) for name in ("a.txt", "b.jsonl", "c.csv")]
    assert found[0] == [{"text": "One line."}, {"text": "第二行。"}] and found[2] == [{"text": "Hi\nYo"}]
    assert found[1][0]["text"].splitlines() == [turn["content"] for turn in DIALOGUES[0]["messages"]]


@pytest.mark.parametrize("row", [{}, {"text": ""}, {"text": " \n"}, {"text": 3}, {"messages": []}])
def test_a_text_that_breaks_the_contract(row):
    assert pretrain.check(None)(row)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_public_dialogues_are_texts_too():
    assert data.read(SHARED / "data" / "sgd/dev.jsonl", pretrain.check(None)).rows


# ------------------------------------------------------------------------------------------------------------- every token once


def predicted(features) -> list[int]:
    """The tokens that blocks ask for, in order: each but the first of a block, where the label says so."""
    return [label for feature in features for label in feature["labels"][1:] if label != IGNORE]


@pytest.mark.parametrize("max_length", [8, 13, 96, 4096])
def test_every_token_of_every_text_is_predicted_once_after_the_one_before_it(max_length, tiny):
    task = task_for(tiny("gpt2"), max_length=max_length)
    features, counts = task.encode(ROWS, "x")
    end = task.tokenizer.eos_token_id
    stream = [token for row in ROWS for token in [*task.tokenizer(row["text"])["input_ids"], end]]
    assert predicted(features) == stream and counts["supervised"] == len(stream)
    context = [feature["input_ids"] for feature in features]
    assert context[0][0] == end
    assert all(one[-1] == other[0] for one, other in zip(context, context[1:], strict=False))  # they share one token
    assert all(len(ids) == max_length for ids in context[:-1]) and 2 <= len(context[-1]) <= max_length
    assert [token for ids in context for token in ids[1:]] == stream
    assert sum(features["bytes"]) == sum(len(row["text"].encode()) for row in ROWS) == counts["bytes"]
    assert (counts["kept"], counts["left_out"]) == (len(ROWS), [])
    lost = [{**feature, "labels": feature["labels"][1:]} for feature in features]  # broken: blocks that don't overlap
    assert predicted(lost) != stream


def test_a_token_that_begins_every_text_is_read_and_not_predicted(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("gpt2"))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    assert pretrain.ends(tokenizer) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    features, _ = pretrain.encode_blocks(ROWS, "x", tokenizer=tokenizer, max_length=16)
    read = [token for feature in features for token in feature["input_ids"]]
    assert read.count(tokenizer.bos_token_id) >= len(ROWS) and tokenizer.bos_token_id not in predicted(features)
    plain = AutoTokenizer.from_pretrained(tiny("gpt2"))
    assert predicted(features) == [t for row in ROWS for t in [*plain(row["text"])["input_ids"], tokenizer.eos_token_id]]


def test_texts_of_a_chat_model_end_with_the_end_of_text_and_not_with_that_of_a_turn(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert pretrain.ends(tokenizer) == (None, tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    with pytest.raises(UserError, match="no end-of-text token"):
        pretrain.ends(AutoTokenizer.from_pretrained(tiny("bert")))


def test_bytes_of_tokens_that_share_a_character_or_leave_blanks_out():
    assert pretrain.token_bytes("卡 a", [(0, 1), (0, 1), (0, 1), (2, 3)]) == [3, 0, 0, 2]
    assert pretrain.token_bytes("", []) == []


def test_dev_loss_perplexity_and_bits_per_byte_are_those_of_the_whole_text(tiny):
    task = task_for(tiny("gpt2"), max_length=200)
    model = task.load_model().eval()
    features, counts = task.encode(ROWS[:1], "x")
    scores = mean_loss(np.array([sums for sums, in dataset_outputs(model, task, features, "x")]))
    ids = torch.tensor([features[0]["input_ids"]])
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids).loss.item()
    assert scores["loss"] == pytest.approx(own, rel=1e-5) and scores["perplexity"] == pytest.approx(math.exp(own), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(own * counts["supervised"] / math.log(2) / len(ROWS[0]["text"].encode()), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------- masking


def words_of(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [encoding] = pretrain._tokenized([text], tokenizer)
    words = pretrain.whole_words(*encoding)
    return ["".join(tokenizer.convert_ids_to_tokens([token for token, _ in word])) if tokenizer.mask_token else
            tokenizer.decode([token for token, _ in word]).strip() for word in words]


def test_words_are_whole_and_a_chinese_character_is_one(tiny):
    assert words_of(tiny("bert"), "Arrived 退货, please") == ["arri##v##e##d", "退", "货", ",", "please"]
    # Byte-level tokenizers take a run of Chinese for one word: each character is one all the same.
    assert words_of(tiny("gpt2"), "Order 退货x, please") == ["Order", "退", "货", "x", ",", "please"]


def raw(task, rows=ROWS):
    return task.encode(rows, "x", training=True)[0]


def collated(task, features, seed=1, epoch=0):
    task.callbacks[0].now.copy_(torch.tensor([seed, epoch]))
    return task.collate(list(features))


def test_the_words_drawn_depend_on_seed_epoch_and_row_and_on_nothing_else(tiny):
    task, (features, _) = task_for(tiny("bert")), task_for(tiny("bert")).encode(ROWS, "x", training=True)
    batch = collated(task, features)
    alone = [collated(task, [feature]) for feature in features]
    for i, row in enumerate(alone):
        length = row["labels"].shape[1]
        assert torch.equal(batch["labels"][i, :length], row["labels"][0]) and (batch["labels"][i, length:] == IGNORE).all()
        assert torch.equal(batch["input_ids"][i, :length], row["input_ids"][0])
    for other in (dict(epoch=1), dict(seed=2)):
        assert not torch.equal(batch["labels"], collated(task, features, **other)["labels"])
    dev = task.encode(ROWS, "x")[0]
    assert all(dev[key] == task_for(tiny("bert")).encode(ROWS, "x")[0][key] for key in ("input_ids", "labels", "bytes"))
    assert torch.equal(collated(task, dev)["labels"], collated(task, dev, epoch=5, seed=3)["labels"])


def test_workers_that_stay_alive_hear_of_the_epoch(tiny):
    task = task_for(tiny("bert"))
    features = raw(task)
    loader = DataLoader(features, batch_size=len(features), collate_fn=task.collate, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        task.callbacks[0].on_epoch_begin(SimpleNamespace(seed=1), SimpleNamespace(epoch=float(epoch)), None)
        [batch] = loader
        assert torch.equal(batch["labels"], collated(task, features, epoch=epoch)["labels"])


def test_of_all_words_15_percent_are_drawn_whole_and_their_tokens_masked_replaced_or_kept(tiny):
    task = task_for(tiny("bert"), max_length=256)
    [feature] = raw(task, [{"text": " ".join(["orders arrived 退货 openness, please"] * 12)}])
    words, fates = np.array(feature["words"]), Counter()
    mask = task.tokenizer.mask_token_id
    for epoch in range(300):
        batch = collated(task, [feature], epoch=epoch)
        labels, shown, ids = batch["labels"][0].numpy(), batch["input_ids"][0].numpy(), np.array(feature["input_ids"])
        at = labels != IGNORE
        drawn = set(words[at].tolist())
        assert len(drawn) == max(1, round(0.15 * (words.max() + 1))) and -1 not in drawn
        assert (at == np.isin(words, list(drawn))).all()  # whole words
        assert (labels[at] == ids[at]).all() and (shown[~at] == ids[~at]).all()
        assert batch["bytes"].item() == np.array(feature["sizes"])[at].sum()
        fates += Counter(np.where(shown == mask, "mask", np.where(shown == ids, "kept", "other"))[at].tolist())
    total = sum(fates.values())
    assert fates["mask"] / total == pytest.approx(0.8, abs=0.02) and fates["other"] / total == pytest.approx(0.1, abs=0.02)


def test_long_texts_become_rows_cut_between_words_and_nothing_is_lost(tiny):
    text = "orders arrived 退货 openness, " * 9 + "open" * 15
    task = task_for(tiny("bert"), max_length=20)
    features, counts = task.encode([{"text": text}, *ROWS], "x", training=True)
    whole = task.tokenizer(text, add_special_tokens=False)
    rows, left = [], len(whole["input_ids"])
    for feature in features:
        if left <= 0:
            break
        rows.append(feature)
        left -= len(feature["input_ids"]) - 2
    assert [t for feature in rows for t in feature["input_ids"][1:-1]] == whole["input_ids"]
    starts = np.cumsum([len(feature["input_ids"]) - 2 for feature in rows])[:-1]
    word_ids = whole.word_ids()
    assert all(word_ids[s] != word_ids[s - 1] for s in starts if word_ids[s] != word_ids[-1])  # the last word alone exceeds a row
    assert all(len(feature["input_ids"]) <= 20 for feature in features)
    assert counts["bytes"] == len(text.rstrip().encode()) + sum(len(row["text"].encode()) for row in ROWS)


def test_a_text_without_a_word_is_counted(tiny):
    _, counts = task_for(tiny("bert")).encode([*ROWS, {"text": "\u200b\u200d"}], "x")
    assert (counts["left_out"], counts["kept"]) == ([6], 5)
    assert "left out, as the tokenizer finds no word: 1 text" in counts["sentences"]
    with pytest.raises(UserError, match="knows no word"):
        task_for(tiny("bert")).encode([{"text": "\x00\x01"}, {"text": "ξένος"}], "x")


def test_words_that_the_tokenizer_does_not_know_are_counted_and_never_asked_for(tiny):
    task = task_for(tiny("bert"))
    features, counts = task.encode([{"text": "orders ξένος arrived"}, {"text": "ξένος ξένος"}, {"text": "please"}], "x", training=True)
    assert [feature["words"] for feature in features] == [[-1, 0, 0, -1, 1, 1, 1, 1, -1], [-1, 0, -1]]
    assert any("3 of 16 tokens are unknown" in sentence and "1 row of nothing else is left out" in sentence
               for sentence in counts["sentences"])
    for epoch in range(20):
        assert task.tokenizer.unk_token_id not in collated(task, features, epoch=epoch)["labels"]


# ------------------------------------------------------------------------------------------------------- next sentences


def sentences_in(task, feature, segment):
    ids = [t for t, kind in zip(feature["input_ids"], feature["token_type_ids"], strict=True) if kind == segment]
    return task.tokenizer.decode(ids, skip_special_tokens=True)


def test_pairs_are_half_consecutive_and_no_sentence_is_lost(tiny):
    task = task_for(tiny("bert"), next_sentence=True, max_length=32)
    texts = [{"text": "。".join("订单号卡退货丢"[(i + j) % 7] * (i + 1) for j in range(6)) + "。"} for i in range(12)]
    features, counts = task.encode(texts, "x", training=True)
    plain = [task.tokenizer.decode(task.tokenizer(row["text"], add_special_tokens=False)["input_ids"]) for row in texts]
    answers, own = Counter(features["next_sentence"]), ""
    assert abs(answers[0] - answers[1]) <= 3 and answers[0] > 10 and answers[IGNORE] == 0
    for feature in features:
        first, second = sentences_in(task, feature, 0), sentences_in(task, feature, 1)
        assert len(feature["input_ids"]) <= 32 and first and second
        together = any(f"{first} {second}" in text for text in plain)
        assert together == (feature["next_sentence"] == 0)
        own += f"{first} {second} " if feature["next_sentence"] == 0 else f"{first} "
    assert own.strip() == " ".join(plain)  # each sentence of each text, in order
    assert features["next_sentence"] == task.encode(texts, "x", training=True)[0]["next_sentence"]
    assert any(f"pairs: {answers[0]} of sentences that follow" in sentence for sentence in counts["sentences"])


def test_pairs_need_several_texts_and_sentences(tiny):
    task = task_for(tiny("bert"), next_sentence=True)
    for rows in ([{"text": "One. Two. Three."}], [{"text": "One"}, {"text": "Two"}]):
        with pytest.raises(UserError, match="--next_sentence needs several texts"):
            task.encode(rows, "x", training=True)
        assert len(task.encode(rows, "x")[0])  # to be scored, they may be few
    features, _ = task.encode([{"text": "One."}], "x")
    assert features["next_sentence"] == [IGNORE] and set(features[0]["token_type_ids"]) == {0}


def test_sentences_are_cut_where_they_end_and_joined_they_are_the_text():
    text = "Dr. No? Yes!\n“好。”他说。真的！！行 3.5 元"
    assert pretrain.sentences_of(text) == ["Dr.", " No?", " Yes!", "\n", "“好。”他说。", "真的！！", "行 3.5 元"]


def test_the_loss_of_pairs_is_the_sum_of_berts_two_means_and_only_tokens_count(tiny):
    task = task_for(tiny("bert"), next_sentence=True)
    model = task.load_model().eval()
    features = task.encode(ROWS, "x")[0]
    batch = task.collate(list(features))
    with torch.no_grad():
        parts = task.loss(model, batch)
        own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], token_type_ids=batch["token_type_ids"],
                    labels=batch["labels"], next_sentence_label=batch["next_sentence"]).loss
        items = (batch["labels"] != IGNORE).sum()
        torch.testing.assert_close(sum(part.nll().sum() for part in parts) / items, own)
        sums = losses.row_sums(parts, batch["bytes"])
        torch.testing.assert_close(sums[:, 0].sum(), parts[0].nll().double().sum())
        assert sums[:, 1].sum() == items and sums[:, 2].tolist() == batch["bytes"].tolist()
        backwards = {**batch, "token_type_ids": 1 - batch["token_type_ids"]}  # broken: the texts change places
        assert not torch.allclose(parts[1].logits, task.loss(model, backwards)[1].logits)
    [told] = task.outputs(parts)
    right = (parts[1].logits.argmax(1) == batch["next_sentence"]).double().mean().item()
    assert task.metrics(told.numpy(), None) == {"next_sentence_accuracy": pytest.approx(100 * right)}


@pytest.mark.parametrize("kind", ["gpt2", "distilbert"])
def test_a_model_without_a_head_for_pairs_is_refused(kind, tiny, tmp_path):
    folder = tiny("gpt2")
    if kind == "distilbert":
        folder = tmp_path
        tokenizer = AutoTokenizer.from_pretrained(tiny("bert"))
        config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=32)
        DistilBertForMaskedLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        task_for(folder)
    with pytest.raises(UserError, match="--next_sentence: .* has no head for it"):
        task_for(folder, next_sentence=True)


# ------------------------------------------------------------------------------------------------------------- whole runs

STEPS = ("--task", "pretrain", "--logging_steps", "1", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1",
         "--num_train_epochs", "3", "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2",
         "--load_best_model_at_end", "False", "--learning_rate", "0.01")
PLAIN = ("--task", "pretrain", "--save_strategy", "no", "--eval_strategy", "no", "--load_best_model_at_end", "False")


class KillInStep8(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise Killed


class Interrupted(RecipeTrainer):
    def __init__(self, *, callbacks, **kwargs):
        super().__init__(callbacks=[*callbacks, KillInStep8()], **kwargs)


@pytest.mark.parametrize("flags", [(), ("--next_sentence",)], ids=["words", "pairs"])
def test_a_run_that_draws_words_resumes_exactly(flags, tiny, folder, tmp_path):
    through = run_recipe("full", tiny("bert"), folder, tmp_path / "through", *STEPS, *flags)
    with pytest.raises(Killed):
        run_recipe("full", tiny("bert"), folder, tmp_path / "killed", *STEPS, *flags, trainer_class=Interrupted)
    resumed = run_recipe("full", tiny("bert"), folder, tmp_path / "killed", *STEPS, *flags, "--resume_from_checkpoint")
    for key in ("loss", "eval_loss", "grad_norm"):
        assert curve(resumed, key) == curve(through, key)
    assert same(trained(resumed.model), trained(through.model))


def test_a_head_that_is_the_table_of_tokens_is_not_said_to_be_drawn(tiny, tmp_path, capsys):
    BertModel.from_pretrained(tiny("bert")).save_pretrained(tmp_path)  # an encoder alone, as sentence encoders are
    model = models.load(models.Source("x", "x", str(tmp_path)), AutoModelForMaskedLM)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    told = "note: cls.predictions.transform.LayerNorm, cls.predictions.transform.dense: not in the checkpoint, drawn at random"
    assert told in capsys.readouterr().out


def test_the_untuned_model_has_the_head_that_the_run_drew(tiny, folder, tmp_path):
    """In each call: with a learning rate of zero the run is still what it started from."""
    BertModel.from_pretrained(tiny("bert")).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(tmp_path / "bert")
    run = tmp_path / "run"
    run_recipe("full", tmp_path / "bert", folder, run, *PLAIN, "--max_steps", "1", "--learning_rate", "0", "--seed", "7")
    result = call("scripts/evaluate.py", "--run", run, "--base", "--dtype", "float32")
    assert result.code == 0, result.err
    table = json.loads((run / "run.json").read_text(encoding="utf-8"))["evaluation"]["test"]["table"]
    untuned, full = ([row["values"] for row in table if row["model"].endswith(name)] for name in ("(untuned)", "full"))
    assert untuned == full


def test_each_epoch_draws_other_words(tiny, folder, tmp_path):
    seen = []

    class Watches(RecipeTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                seen.append((inputs["input_ids"].shape[1], inputs["labels"].tolist()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    run_recipe("full", tiny("bert"), folder, tmp_path / "run", *STEPS, trainer_class=Watches)
    epochs = [sorted(map(str, seen[start: start + len(ROWS)])) for start in range(0, 15, len(ROWS))]
    assert len(epochs) == 3 and epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_run_records_what_it_read_and_what_it_computed_and_is_evaluated(tiny, folder, tmp_path, monkeypatch, recwarn):
    run, told = tmp_path / "run", []  # told: what transformers says of its own, on matters that are none of the user's
    monkeypatch.setattr("transformers.trainer_utils.logger.warning", told.append)  # other special tokens than the model's
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", told.append)  # a padding token where no mask is given
    trainer = run_recipe("lora", tiny("gpt2"), folder, run, *PLAIN, "--max_steps", "3")
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    total, lora = record["total_parameters"], record["trainable_parameters"]
    assert record["flops"] == trainer.state.num_input_tokens_seen * (4 * total + 2 * lora) > 0
    assert record["metrics"].keys() >= {"dev_loss", "dev_perplexity", "dev_bits_per_byte"}
    assert record["data"]["splits"]["train"]["kept"] == len(ROWS)
    result = call("scripts/evaluate.py", "--run", run, "--base", "--dtype", "float32", "--max_new_tokens", "8")
    assert result.code == 0 and not told, (result.err, told)
    scores = json.loads((run / "run.json").read_text(encoding="utf-8"))["evaluation"]["test"]
    assert scores["columns"] == ["loss", "perplexity", "bits/byte"]
    assert {row["language"]: row["count"] for row in scores["table"] if row["model"] == "lora"} == {"en": 3, "zh": 2, "all": 5}
    assert len(scores["samples"]) == 3
    assert [who for who, _ in scores["samples"][0]] == ["text", "right", f"{tiny('gpt2')} (untuned)", "lora"]
    assert ROWS[0]["text"].startswith(scores["samples"][0][0][1]) and scores["samples"][0][1][1] in ROWS[0]["text"]
    assert "bits/byte" in (run / "report.html").read_text(encoding="utf-8")


def test_an_encoder_learns_its_words_by_heart_and_fills_them_in(tiny, write_jsonl, tmp_path):
    rows = [{"text": "Are you open? Yes, until nine."}, {"text": "好的，请告诉我订单号。"}]
    for split in ("train", "dev"):
        write_jsonl(rows, f"{split}.jsonl")
    trainer = run_recipe("full", tiny("bert"), tmp_path, tmp_path / "run", *PLAIN, "--max_steps", "200", "--learning_rate", "5e-3",
                         "--model_dropout", "0", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1")
    task = trainer.task
    candidates = {"untuned": evaluation.Candidate(lambda: task.load_model().eval(), task),
                  "tuned": evaluation.Candidate(lambda: trainer.model.eval(), task)}
    scores = pretrain.evaluate(candidates, task, rows, {}, SimpleNamespace(samples=2))
    table = {(row["language"], row["model"]): row["values"] for row in scores["table"]}
    assert table["all", "tuned"][0] < 1.5 < 4 < table["all", "untuned"][0]
    told = [dict(sample) for sample in scores["samples"]]
    assert all(one["text"].count("[MASK]") == len(one["right"].split()) == len(one["tuned"].split()) for one in told)
    right = {name: [a == b for one in told for a, b in zip(one["right"].split(), one[name].split(), strict=True)] for name in candidates}
    assert np.mean(right["tuned"]) > 0.5 > 0.2 > np.mean(right["untuned"])


@pytest.mark.parametrize("recipe", ["prefix", "lora", "adapter"])
def test_a_peft_method_reads_which_text_a_token_belongs_to_and_trains_a_new_head(recipe, tiny, folder, tmp_path):
    BertForMaskedLM.from_pretrained(tiny("bert")).save_pretrained(tmp_path / "bert")  # this class has no head for pairs, and no pooler
    AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(tmp_path / "bert")
    run = tmp_path / "run"
    trainer = run_recipe(recipe, tmp_path / "bert", folder, run, *PLAIN, "--next_sentence", "--max_steps", "3")
    assert any("seq_relationship.modules_to_save" in name for name in trained(trainer.model))
    network = losses.network(trainer.model)
    assert network.cls.predictions.decoder.weight is network.bert.embeddings.word_embeddings.weight
    task = tasks.of_run(json.loads((run / "run.json").read_text(encoding="utf-8")), models.load_run_tokenizer(run))
    loaded = models.load_run(run, torch.float32, task.auto_class, task.config)
    batch = task.collate(list(task.encode(ROWS, "x")[0]))
    with torch.no_grad():
        for model in (trainer.model.eval(), loaded):
            one = task.loss(model, batch)[1].logits
            assert not torch.allclose(one, task.loss(model, {**batch, "token_type_ids": 0 * batch["token_type_ids"]})[1].logits)
        torch.testing.assert_close(one, task.loss(trainer.model, batch)[1].logits, rtol=1e-4, atol=1e-5)
    scores = pretrain.evaluate({"run": evaluation.Candidate(lambda: loaded, task)}, task, ROWS, {}, SimpleNamespace(samples=2))
    assert scores["columns"] == ["loss", "perplexity", "bits/byte", "next"] and len(scores["samples"]) == 2
    assert all(0 <= row["values"][3] <= 100 for row in scores["table"]) and [row["language"] for row in scores["table"]][-1] == "all"


def test_the_new_parts_of_a_tied_head_are_trained_without_it(tiny, folder, tmp_path):
    BertForPreTraining.from_pretrained(tiny("bert")).bert.save_pretrained(tmp_path / "bert")  # no head at all, as sentence encoders come
    AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(tmp_path / "bert")
    trainer = run_recipe("lora", tmp_path / "bert", folder, tmp_path / "run", *PLAIN, "--max_steps", "2")
    saved = {name for name in trained(trainer.model) if "modules_to_save" in name}
    assert any("transform.dense" in name for name in saved) and not any("decoder" in name for name in saved)
    network = losses.network(trainer.model)
    assert network.cls.predictions.decoder.weight is network.bert.embeddings.word_embeddings.weight


def test_an_encoder_decoder_is_refused_before_anything_is_written(tiny, folder, tmp_path):
    for flags in ((), ("--from_scratch",)):
        with pytest.raises(UserError, match="is an encoder-decoder .*filling in spans"):
            run_recipe("full", tiny("t5"), folder, tmp_path / "run", *PLAIN, *flags)
        assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ from scratch

MODEL = pretrain.MODELS["decoder"]


OF_KIND = {"gpt2": ("290", "n_embd=16,n_layer=1,n_head=2"),
           "llama": ("290", "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=1,head_dim=8"),
           "bert": ("90", "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=8")}


@pytest.mark.parametrize("kind", OF_KIND)
def test_a_model_from_scratch_has_the_sizes_and_the_vocabulary_asked_for_and_is_found_again(kind, tiny, folder, tmp_path):
    size, sizes = OF_KIND[kind]
    config, run = tmp_path / "model", tmp_path / "run"  # config and tokenizer alone: no weight is read
    shutil.copytree(tiny(kind), config, ignore=shutil.ignore_patterns("*.safetensors"))
    trainer = run_recipe("full", config, folder, run, *PLAIN, "--from_scratch", "--vocab_size", size, "--config_overrides", sizes,
                         "--max_steps", "1")
    record = models.read_record(run)
    task = tasks.of_run(record, models.load_run_tokenizer(run))
    model = models.load_run(run, torch.float32, task.auto_class)
    assert len(task.tokenizer) == model.config.vocab_size == int(size)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (1, 16)
    assert model.config.eos_token_id == task.tokenizer.eos_token_id
    assert same(model.state_dict(), trainer.model.state_dict())
    assert record["model"]["requested"] == str(config) and trainer.args.learning_rate == 1e-3


def test_another_architecture_takes_the_tokenizer_of_the_model(tiny, folder, tmp_path):
    run = tmp_path / "run"
    run_recipe("full", tiny("llama"), folder, run, *PLAIN, "--from_scratch", "--model_type", "gpt2", "--vocab_size", "290",
               "--config_overrides", "n_embd=16,n_layer=1,n_head=2", "--max_steps", "1")
    task = tasks.of_run(models.read_record(run), models.load_run_tokenizer(run))
    model = models.load_run(run, torch.float32, task.auto_class)
    assert model.config.model_type == "gpt2" and model.config.hidden_size == 16 and model.config.n_positions == 1024
    assert model.config.vocab_size == len(task.tokenizer) == 290 and model.config.eos_token_id == task.tokenizer.eos_token_id
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "loss over tokens" in report and "operations" in report


@pytest.mark.parametrize(("name", "wrong"), [("gpt2x", "--model_type gpt2x is no architecture .*did you mean gpt2"),
                                             ("zzzzz", "--model_type zzzzz is no architecture .*as gpt2"),
                                             ("bert", r"--model_type bert \(encoder\) would get the tokenizer of .* \(decoder\)"),
                                             ("t5", r"--model_type t5 \(encoder-decoder\)")])
def test_an_architecture_that_is_none_or_of_another_kind(name, wrong, tiny, folder, tmp_path):
    with pytest.raises(UserError, match=wrong):
        run_recipe("full", tiny("llama"), folder, tmp_path / "run", *PLAIN, "--from_scratch", "--model_type", name)
    assert not (tmp_path / "run" / "start").exists()


def test_the_weights_are_drawn_by_the_seed(tiny, tmp_path):
    source = models.resolve(str(tiny("gpt2")))
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        training = SimpleNamespace(output_dir=str(tmp_path / name), seed=seed, resume_from_checkpoint=None, process_index=0)
        torch.manual_seed(len(states))  # what was drawn before does not matter
        start = scratch.start(args.SharedArguments(task="pretrain"), training, source, models.load_tokenizer(source), MODEL, list)
        states.append(models.load(start, MODEL).state_dict())
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_the_start_of_a_run_that_was_moved_is_found_by_evaluate(tiny, folder, tmp_path):
    run_recipe("full", tiny("gpt2"), folder, tmp_path / "run", *PLAIN, "--from_scratch", "--vocab_size", "290", "--max_steps", "2")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    result = call("scripts/evaluate.py", "--run", tmp_path / "moved", "--base", "--dtype", "float32", "--max_new_tokens", "4")
    assert result.code == 0 and "start (drawn at random)" in result.out, result.err
    scores = json.loads((tmp_path / "moved" / "run.json").read_text(encoding="utf-8"))["evaluation"]["test"]
    base = next(row["values"][0] for row in scores["table"] if row["model"].startswith("start") and row["language"] == "all")
    assert base == pytest.approx(math.log(290), abs=0.2)  # it knows nothing: as likely as any other token
    report, card = ((tmp_path / "moved" / name).read_text(encoding="utf-8") for name in ("report.html", "MODEL_CARD.md"))
    assert "full on gpt2 from scratch" in report and "every weight was drawn at random" in report and "could not be reached" not in report
    assert "gpt2 from scratch, trained with" in card and "could not be reached" not in card and "pipeline_tag: text-generation" in card


def test_a_run_from_scratch_resumes_exactly_and_with_its_own_sizes(tiny, folder, tmp_path):
    flags = ("--from_scratch", "--vocab_size", "290", "--config_overrides", "n_layer=1")
    steps = (*STEPS, "--max_length", "16", "--max_steps", "8")
    through = run_recipe("full", tiny("gpt2"), folder, tmp_path / "through", *steps, *flags)
    with pytest.raises(Killed):
        run_recipe("full", tiny("gpt2"), folder, tmp_path / "killed", *steps, *flags, trainer_class=Interrupted)
    for other, wrong in ((("--config_overrides", "n_layer=2"), "--config_overrides n_layer=2: .* began with n_layer=1"),
                         (("--vocab_size", "280"), "--vocab_size 280: .* began with 290"), (("--seed", "7"), "--seed 7: .* began with 42")):
        with pytest.raises(UserError, match=wrong):
            run_recipe("full", tiny("gpt2"), folder, tmp_path / "killed", *steps, *flags, *other, "--resume_from_checkpoint")
    shutil.move(tmp_path / "killed", tmp_path / "moved")
    resumed = run_recipe("full", tiny("gpt2"), folder, tmp_path / "moved", *steps, *flags, "--resume_from_checkpoint")
    assert curve(resumed, "loss") == curve(through, "loss") and same(trained(resumed.model), trained(through.model))


def test_a_run_from_scratch_is_repeated_from_its_own_model_and_not_from_what_became_of_it(tiny, folder, tmp_path):
    trainer = run_recipe("full", tiny("bert"), folder, tmp_path / "run", *PLAIN, "--from_scratch", "--vocab_size", "90", "--max_steps", "2")
    config = shutil.move(tmp_path / "run" / "run.json", tmp_path / "run.json")
    shutil.rmtree(tmp_path / "run")
    result = call("scripts/train.py", "--config", config, "--output_dir", tmp_path / "again")
    assert result.code == 0 and "note: the model is" not in result.out, result.err
    again = json.loads((tmp_path / "again" / "run.json").read_text(encoding="utf-8"))
    assert again["model"]["requested"] == str(tiny("bert"))
    assert "pipeline_tag: fill-mask" in (tmp_path / "again" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert again["metrics"]["dev_loss"] == trainer.state.log_history[-1]["eval_loss"]


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tiny, folder, tmp_path):
    (tmp_path / "run" / "start").mkdir(parents=True)
    for flags in ((), ("--from_scratch",)):  # a folder of that name may be anyone's
        with pytest.raises(UserError, match="holds files that are no run's .start."):
            run_recipe("full", tiny("gpt2"), folder, tmp_path / "run", *PLAIN, *flags, "--max_steps", "1")
    (tmp_path / "run" / "start" / scratch.ASKED).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="holds files that are no run's .start."):
        run_recipe("full", tiny("gpt2"), folder, tmp_path / "run", *PLAIN, "--max_steps", "1")
    run_recipe("full", tiny("gpt2"), folder, tmp_path / "run", *PLAIN, "--from_scratch", "--max_steps", "1")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "start")) == len(AutoTokenizer.from_pretrained(tiny("gpt2")))
    assert not list(tmp_path.glob("run/tmp*"))


@pytest.mark.parametrize(("text", "wrong"), [
    ("hidden_sise=8", "gpt2 has no hidden_sise to set"), ("n_layr=2", "did you mean n_layer"),
    ("n_layer", "write NAME=VALUE"), ("n_layer=", "write NAME=VALUE"), ("n_layer=two", "two is no int, as 2 is"),
    ("n_layer=2.5", "2.5 is no int"), ("n_layer=true", "true is no int"), ("vocab_size=9", "--vocab_size sets it"),
    ("n_head=5", "gives no model that works"), ("n_positions=1", "gives no model that works"),
    ("n_positions=6", "--max_length 8 exceeds the 6 tokens")])
def test_sizes_that_make_no_model(text, wrong, tiny, folder, tmp_path):
    with pytest.raises(UserError, match=wrong):
        run_recipe("full", tiny("gpt2"), folder, tmp_path / "run", *PLAIN, "--max_length", "8", "--from_scratch",
                   "--config_overrides", text)
    assert not (tmp_path / "run" / "start").exists()


def test_sizes_that_a_config_itself_refuses(tiny, folder, tmp_path):
    with pytest.raises(UserError, match="num_attention_heads=3 gives no model that works"):
        run_recipe("full", tiny("llama"), folder, tmp_path / "run", *PLAIN, "--from_scratch", "--config_overrides", "num_attention_heads=3")


def test_sizes_are_read_by_the_type_that_they_have():
    config = GPT2Config()
    assert scratch.overrides("hidden_size=8, resid_pdrop=0,scale_attn_weights=False,activation_function=relu,n_inner=12", config) == {
        "n_embd": 8, "resid_pdrop": 0.0, "scale_attn_weights": False, "activation_function": "relu", "n_inner": 12}
    assert scratch.overrides(None, config) == {}


def test_a_vocabulary_smaller_than_its_alphabet_is_refused_and_a_smaller_one_than_asked_for_is_said(tiny, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny("gpt2"))
    texts = [row["text"] for row in ROWS]
    with pytest.raises(UserError, match="--vocab_size 100: .* are 257 already"):
        scratch.train_tokenizer(tokenizer, lambda: texts, 100)
    new = scratch.train_tokenizer(tokenizer, lambda: texts, 5000)
    assert f"give {len(new)} tokens and no more" in capsys.readouterr().out and new.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_trained_vocabulary_is_the_same_whenever_it_is_trained(kind, tiny, tmp_path):
    """WordPiece's trainer itself numbers what goes on a word anew in each call, and its words are others then."""
    tokenizer, texts = AutoTokenizer.from_pretrained(tiny(kind)), [row["text"] for row in ROWS]
    one, other = (scratch.train_tokenizer(tokenizer, lambda: iter(texts), 300) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    assert all(getattr(one, name) == getattr(tokenizer, name) for name in ("cls_token", "mask_token", "eos_token", "all_special_ids"))
    text = "Are you open? 我想退货。"
    assert one.decode(one(text)["input_ids"], skip_special_tokens=True).replace(" ", "").lower() == text.replace(" ", "").lower()
    one.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == one.get_vocab() and again(text, text) == one(text, text)
    if kind == "bert":
        plain, other = (tokenizer.train_new_from_iterator(texts, 300, show_progress=False).get_vocab() for _ in range(2))
        assert plain != other
        assert one(text)["input_ids"][0] == one.cls_token_id and len(one(text, text)["input_ids"]) == 2 * len(one(text)["input_ids"]) - 1


@pytest.mark.parametrize("recipe", ["lora", "adalora", "prefix", "adapter"])
def test_only_full_learns_from_scratch(recipe, tiny, folder, tmp_path):
    with pytest.raises(UserError, match="--from_scratch draws every weight at random, .*use --recipe full"):
        run_recipe(recipe, tiny("gpt2"), folder, tmp_path / "run", *PLAIN, "--from_scratch")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "wrong"), [
    (("--task", "pretrain", "--vocab_size", "300"), "--vocab_size .*add --from_scratch"),
    (("--task", "pretrain", "--model_type", "gpt2"), "--model_type .*add --from_scratch"),
    (("--task", "pretrain", "--config_overrides", "n_layer=1"), "--config_overrides .*add --from_scratch"),
    (("--task", "chat", "--from_scratch"), "--from_scratch is for --task pretrain"),
    (("--task", "pretrain", "--from_scratch", "--train_top_layers", "1"), "--train_top_layers would leave"),
    (("--task", "pretrain", "--from_scratch", "--start_from", "x"), "--start_from")])
def test_flags_that_do_not_go_together(flags, wrong, tiny, folder, tmp_path):
    with pytest.raises(UserError, match=wrong):
        run_recipe("full", tiny("gpt2"), folder, tmp_path / "run", *flags)


def test_the_estimate_is_kaplans_where_everything_is_trained():
    assert runs.flops(tokens=10, trained=7, total=7) == 6 * 7 * 10 and runs.flops(10, 0, 7) == 4 * 7 * 10
