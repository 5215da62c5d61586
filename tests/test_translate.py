"""The task translate: pairs for encoder-decoders and for decoder-only models, whole runs with every recipe, and what they write."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED
from test_cli import call
from test_methods import run_recipe
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig

from recipes.common import args, data, generation, losses, models, tasks
from recipes.common.chat import IGNORE
from recipes.common.errors import UserError
from recipes.common.tasks import translate

ROWS = [{"source": "Where is my order?", "target": "我的订单在哪里？"}, {"source": "Thank you!", "target": "谢谢！"},
        {"source": "The card is lost.", "target": "卡丢了。"}, {"source": "Are you open?", "target": "你们开门吗？"}]


def task_for(folder, **options):
    shared = args.SharedArguments(task="translate", **options)
    source = models.resolve(str(folder))
    shared.max_length = shared.max_length or 96
    return translate.make(shared, source, models.load_tokenizer(source), {})


def batch_of(task, rows=ROWS):
    features, counts = task.encode(rows, "pairs.jsonl")
    return task.collate([features[i] for i in range(len(features))]), counts


def test_an_encoder_decoder_reads_the_source_and_is_asked_for_the_target_and_its_end(tiny):
    task = task_for(tiny("t5"), source_prefix="translate: ")
    batch, counts = batch_of(task)
    for i, row in enumerate(ROWS):
        ids = batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()
        labels = [label for label in batch["labels"][i].tolist() if label != IGNORE]
        assert task.tokenizer.decode(ids) == f"translate: {row['source']}</s>"
        assert task.tokenizer.decode(labels) == f"{row['target']}</s>" and labels.count(task.tokenizer.eos_token_id) == 1
    assert counts["supervised"] == int((batch["labels"] != IGNORE).sum())


def test_the_loss_is_the_models_own_and_padding_does_not_change_it(tiny):
    task = task_for(tiny("t5"))
    model, (batch, _) = task.load_model().eval(), batch_of(task)
    with torch.no_grad():
        [part] = losses.same_token(model, batch)
        torch.testing.assert_close(part.nll().mean(), model(**batch).loss)
        alone = torch.cat([losses.same_token(model, batch_of(task, [row])[0])[0].nll() for row in ROWS])
    torch.testing.assert_close(part.nll(), alone, rtol=1e-4, atol=1e-5)


def test_a_decoder_only_model_is_asked_in_a_dialogue(tiny):
    task = task_for(tiny("llama"), instruction="Translate to Chinese:")
    batch, counts = batch_of(task)
    for i, row in enumerate(ROWS):
        text = task.tokenizer.decode(batch["input_ids"][i][batch["attention_mask"][i] == 1])
        learned = task.tokenizer.decode([label for label in batch["labels"][i].tolist() if label != IGNORE])
        assert f"<|im_start|>user\nTranslate to Chinese:\n{row['source']}<|im_end|>" in text
        assert learned == f"{row['target']}<|im_end|>"
    assert counts["unit"] == "pairs"


def test_long_sources_lose_their_end_and_long_targets_are_left_out_and_both_are_said(tiny):
    task = task_for(tiny("t5"), max_length=16)
    rows = [*ROWS[1:2], {"source": "word " * 30, "target": "x"}, {"source": "x", "target": "word " * 30}]
    features, counts = task.encode(rows, "pairs.jsonl")
    assert (counts["kept"], counts["shortened"], counts["left_out"]) == (2, 1, [3])
    assert len(features[1]["input_ids"]) == 16 and features[1]["input_ids"][-1] == task.tokenizer.eos_token_id
    assert any("1 source exceeds --max_length 16: the end is cut off" in sentence for sentence in counts["sentences"])
    assert any("left out" in sentence and sentence.endswith(": 1 pair") for sentence in counts["sentences"])
    with pytest.raises(UserError, match="every target is longer"):
        task.encode(rows[2:], "pairs.jsonl")


@pytest.mark.parametrize(("kind", "options", "wrong"), [
    ("t5", {"instruction": "Translate:"}, "--instruction asks a decoder-only model"),
    ("llama", {"source_prefix": "translate: "}, "--source_prefix is for encoder-decoders")])
def test_a_flag_of_the_other_kind_of_model_is_refused(kind, options, wrong, tiny):
    with pytest.raises(UserError, match=wrong):
        task_for(tiny(kind), **options)


@pytest.mark.parametrize("model_type", ["mbart", "m2m_100"])
def test_models_that_write_the_language_of_a_code_are_refused(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    with pytest.raises(UserError, match="the language that a code says"):
        translate.make(SimpleNamespace(instruction=None), models.Source("m", "m", str(tmp_path)), None, {})


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_loss_over_the_first_of_several_references_is_said(kind, tiny):
    rows = [*ROWS, {"source": "Bye", "refs": ["再见", "拜拜"]}, {"source": "Bye", "refs": ["再见"]}]
    _, counts = batch_of(task_for(tiny(kind)), rows)
    assert counts["sentences"] == ['1 pair has several "refs" and no "target": the loss is over the first one']
    assert batch_of(task_for(tiny(kind)))[1]["sentences"] == []


def test_the_top_layers_of_an_encoder_decoder_are_not_defined(tiny, folder, tmp_path):
    with pytest.raises(UserError, match="its top layers are not defined: leave --train_top_layers out"):
        run_recipe("full", tiny("t5"), folder, tmp_path / "run", "--task", "translate", "--train_top_layers", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs")
    for split, rows in (("train", ROWS), ("dev", ROWS[:2]), ("test", [*ROWS, {"source": "Bye", "refs": ["再见", "拜拜"]}])):
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return out


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_it_learns_its_pairs_by_heart_and_writes_them(kind, tiny, folder, tmp_path):
    run = tmp_path / "run"
    run_recipe("full", tiny(kind), folder, run, "--task", "translate", "--max_steps", "150", "--learning_rate", "1e-2",
               "--per_device_train_batch_size", "4", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "False")
    out = tmp_path / "scores.json"
    result = call("scripts/evaluate.py", "--run", run, "--base", "--json", out, "--dtype", "float32", "--max_new_tokens", "40")
    assert result.code == 0, result.err
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["tokens"] == 150 * record["data"]["splits"]["train"]["tokens"]  # of an encoder-decoder too, with the targets
    lines = [json.loads(line) for line in (run / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["full"] for line in lines[:4]] == [row["target"] for row in ROWS]
    assert lines[4]["references"] == ["再见", "拜拜"]
    scores = json.loads(out.read_text(encoding="utf-8"))
    table = {(row["language"], row["model"]): dict(zip(scores["columns"], row["values"], strict=True)) for row in scores["table"]}
    assert set(language for language, _ in table) == {"zh", "all"}
    assert table["all", "full"]["chrF"] > 50 > table["all", f"{tiny(kind)} (untuned)"]["chrF"]
    beams = call("scripts/evaluate.py", "--run", run, "--num_beams", "2", "--dtype", "float32", "--max_new_tokens", "40")
    assert beams.code == 0 and "2 beams" in beams.out, beams.err


@pytest.mark.parametrize("method", ["lora", "prefix", "adapter"])
def test_a_tuned_encoder_decoder_has_its_own_loss_and_is_the_same_when_loaded_and_when_merged(method, tiny, folder, tmp_path):
    run = tmp_path / "run"
    trainer = run_recipe(method, tiny("t5"), folder, run, "--task", "translate", "--max_steps", "6", "--learning_rate", "5e-2",
                         "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "False")
    task, tuned = task_for(tiny("t5")), trainer.model.eval()
    batch, _ = batch_of(task)
    sources = [task.tokenizer(row["source"])["input_ids"] for row in ROWS]

    def logits(model):
        with torch.no_grad():
            [part] = losses.same_token(model, batch)
            torch.testing.assert_close(part.nll().mean(), model(**batch).loss)
        return part.logits

    def written(model):
        return generation.write(model, task.tokenizer, sources, generation.right_pad, 8, 3, 1, "x")

    assert (logits(tuned) - logits(task.load_model().eval())).abs().max() > 1e-2
    for merge in (False, True):
        loaded = models.load_run(run, torch.float32, task.auto_class, task.config, merge=merge)
        torch.testing.assert_close(logits(loaded), logits(tuned), rtol=1e-4, atol=1e-4)
        assert written(loaded) == written(tuned)


@pytest.fixture(scope="module")
def bart(tiny, tmp_path_factory):
    """A BART of 64 positions that comes with the decoding of a summariser: beams, a least length, a forced end."""
    out, tokenizer = tmp_path_factory.mktemp("bart"), models.load_tokenizer(models.resolve(str(tiny("t5"))))
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, forced_eos_token_id=None))
    model.final_logits_bias[0, tokenizer.eos_token_id] = -100.0  # so that it never ends by itself
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    GenerationConfig(num_beams=4, early_stopping=True, length_penalty=2.0, min_length=5, no_repeat_ngram_size=3, forced_eos_token_id=1,
                     bad_words_ids=[[7]], eos_token_id=1, pad_token_id=0, decoder_start_token_id=0).save_pretrained(out)
    return out


def test_a_summarisers_decoding_is_not_taken_over(bart, folder, tmp_path):
    run = tmp_path / "run"
    run_recipe("full", bart, folder, run, "--task", "translate", "--max_steps", "2", "--learning_rate", "1e-5", "--max_length", "32",
               "--load_best_model_at_end", "False")
    own = GenerationConfig.from_pretrained(run)
    assert (own.num_beams, own.min_length, own.forced_eos_token_id, own.no_repeat_ngram_size) == (1, None, None, None)
    assert (own.bad_words_ids, own.eos_token_id, own.decoder_start_token_id) == ([[7]], 1, 0)
    result = call("scripts/evaluate.py", "--run", run, "--dtype", "float32", "--max_new_tokens", "64")
    assert result.code == 0 and "5 of 5 targets did not end within 64 tokens and were cut" in result.out, result.err
    longer = call("scripts/evaluate.py", "--run", run, "--dtype", "float32", "--max_new_tokens", "67")
    assert longer.code != 0 and "--max_new_tokens 67 exceeds" in longer.err and "by 3 or more" in longer.err
    shutil.copytree(run, tmp_path / "other")
    together = call("scripts/evaluate.py", "--run", run, "--run", tmp_path / "other", "--max_new_tokens", "8")
    assert together.code == 0 and "ensemble" in together.out, together.err


def test_sources_that_are_read_without_their_end_are_said_whatever_their_target(tiny, folder, tmp_path):
    run, rows = tmp_path / "run", tmp_path / "long.jsonl"
    run_recipe("lora", tiny("t5"), folder, run, "--task", "translate", "--max_steps", "1", "--max_length", "24",
               "--load_best_model_at_end", "False")
    long = {"source": "word " * 60, "target": "word " * 60}
    rows.write_text("".join(json.dumps(row) + "\n" for row in (*ROWS[1:2], long)), encoding="utf-8")
    result = call("scripts/evaluate.py", "--run", run, "--data", rows, "--dtype", "float32", "--max_new_tokens", "4")
    assert "note: lora reads 1 source without the end, which exceeds --max_length 24" in result.out, result.err
    assert "left out, as their target exceeds --max_length 24: 1 pair\n" in result.out


def test_beams_of_another_task_are_refused(tmp_path):
    record = {"recipe": "lora", "task": "chat", "model": {}, "data": {}, "shared_arguments": {}, "training_arguments": {}}
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    result = call("scripts/evaluate.py", "--run", tmp_path, "--num_beams", "4")
    assert result.code != 0 and "--num_beams 4 is for --task translate" in result.err


def test_targets_written_in_batches_equal_those_written_alone(tiny):
    task = task_for(tiny("t5"))
    torch.manual_seed(0)
    model = task.load_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    sources = [task.tokenizer(row["source"])["input_ids"] for row in ROWS]
    together, _ = generation.write(model, task.tokenizer, sources, generation.right_pad, 12, 3, 1, "x")
    alone = [generation.write(model, task.tokenizer, [ids], generation.right_pad, 12, 1, 1, "x")[0][0] for ids in sources]
    assert together == alone and len(set(alone)) > 1


@pytest.mark.parametrize("row", [{"source": "x"}, {"target": "x"}, {"source": "", "target": "x"}, {"source": "x", "target": 3},
                                 {"source": "x", "refs": []}])
def test_a_pair_that_breaks_the_contract(row):
    assert translate.check(None)(row)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_public_pairs_keep_the_contract():
    for name in ("tatoeba_en_zh/dev.jsonl", "multiwoz_parallel_en_zh/dev.jsonl"):
        assert data.read(SHARED / "data" / name, translate.check(None)).rows


def test_the_task_of_a_run_is_made_again_from_its_record(tiny, folder, tmp_path):
    run_recipe("lora", tiny("t5"), folder, tmp_path / "run", "--task", "translate", "--max_steps", "2", "--source_prefix", "t: ",
               "--load_best_model_at_end", "False")
    record = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    task = tasks.of_run(record, models.load_run_tokenizer(tmp_path / "run"))
    assert task.tokenizer.decode(task.encode(ROWS, "x")[0][0]["input_ids"]).startswith("t: Where")
