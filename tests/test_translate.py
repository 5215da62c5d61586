"""The task translate: pairs for encoder-decoders and for decoder-only models, whole runs with every recipe, and what they write."""

import json

import pytest
import torch
from conftest import SHARED
from test_cli import call
from test_methods import run_recipe

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
    assert any("1 sources exceed --max_length 16" in sentence for sentence in counts["sentences"])
    assert any("left out" in sentence and "1 pairs" in sentence for sentence in counts["sentences"])
    with pytest.raises(UserError, match="every target is longer"):
        task.encode(rows[2:], "pairs.jsonl")


@pytest.mark.parametrize(("kind", "options", "wrong"), [
    ("t5", {"instruction": "Translate:"}, "--instruction asks a decoder-only model"),
    ("llama", {"source_prefix": "translate: "}, "--source_prefix is for encoder-decoders")])
def test_a_flag_of_the_other_kind_of_model_is_refused(kind, options, wrong, tiny):
    with pytest.raises(UserError, match=wrong):
        task_for(tiny(kind), **options)


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
    lines = [json.loads(line) for line in (run / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["full"] for line in lines[:4]] == [row["target"] for row in ROWS]
    assert lines[4]["references"] == ["再见", "拜拜"]
    scores = json.loads(out.read_text(encoding="utf-8"))
    table = {(row["language"], row["model"]): dict(zip(scores["columns"], row["values"], strict=True)) for row in scores["table"]}
    assert set(language for language, _ in table) == {"zh", "all"}
    assert table["all", "full"]["chrF"] > 50 > table["all", f"{tiny(kind)} (untuned)"]["chrF"]
    beams = call("scripts/evaluate.py", "--run", run, "--num_beams", "2", "--dtype", "float32", "--max_new_tokens", "40")
    assert beams.code == 0 and "2 beams" in beams.out, beams.err


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
