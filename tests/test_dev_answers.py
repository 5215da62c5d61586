"""Dev rows answered while training: what is asked, what is scored, and that the training takes no notice of it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DIALOGUES, ROOT
from test_cli import call, refused, shell
from test_methods import run_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.common import chat, dev_answers, generation, metrics, models

STEPS = ("--max_steps", "3", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--eval_strategy", "steps",
         "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--load_best_model_at_end", "True", "--logging_steps", "1")
ANSWERS = ("--eval_generate_rows", "5", "--eval_generate_tokens", "6")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogues")
    for split in ("train", "dev"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in DIALOGUES)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"source": "Are you open?", "target": "我们开门"}, {"source": "Thank you!", "target": "谢谢"}] * 3
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def features(tokenizer):
    encoded = [chat.encode(row["messages"], tokenizer, 200) for row in DIALOGUES]
    return [{"input_ids": e.input_ids, "labels": e.labels} for e in encoded]


@pytest.fixture(scope="module")
def llama(tiny):
    """A tiny model shaken until it has something to say."""
    model, noise = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    return model, AutoTokenizer.from_pretrained(tiny("llama"))


def test_each_assistant_turn_is_asked_with_its_true_history(llama):
    _, tokenizer = llama
    asked = dev_answers.questions(features(tokenizer), tokenizer, 99, encoder_decoder=False)
    expected = [(chat.prompt(row["messages"][:i], tokenizer, 200), m["content"])
                for row in DIALOGUES for i, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    assert asked == expected
    assert [dev_answers._spread(9, 3), dev_answers._spread(3, 9), dev_answers._spread(0, 4)] == [[0, 3, 6], [0, 1, 2], []]
    assert len(dev_answers.questions(features(tokenizer), tokenizer, 3, encoder_decoder=False)) == 3


def test_the_scores_are_those_of_one_by_one_answers(llama, capsys):
    model, tokenizer = llama
    asked = dev_answers.questions(features(tokenizer), tokenizer, 99, encoder_decoder=False)
    answers = []
    for prompt, _ in asked:
        out = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                             max_new_tokens=8, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0)
        answers.append(generation.text(out[0, len(prompt):].tolist(), model, tokenizer)[0])
    own = [(prompt, answer if i % 2 else reference) for i, ((prompt, reference), answer) in enumerate(zip(asked, answers, strict=True))]
    expected = metrics.score_replies(answers, [reference for _, reference in own])["all"]
    found = dev_answers.score(model, tokenizer, own, 8, seconds=60)
    assert found == pytest.approx({name: expected[name] for name in dev_answers.SCORES})
    assert 0 < found["chrf"] < 100 and capsys.readouterr().out == ""


def test_a_cut_is_told_and_leaves_whole_batches(llama, monkeypatch, capsys):
    """A clock that ticks a second a call: after one batch, then after two."""
    model, tokenizer = llama
    asked = dev_answers.questions(features(tokenizer), tokenizer, 99, encoder_decoder=False)
    monkeypatch.setattr(dev_answers, "BATCH", 2)
    for seconds, written in ((0.5, 2), (1.5, 4), (99, 7)):
        monkeypatch.setattr(dev_answers, "time", SimpleNamespace(monotonic=iter(range(99)).__next__))
        scored = []
        monkeypatch.setattr(dev_answers, "gather_object", lambda answers, scored=scored: scored.extend(answers) or answers)
        dev_answers.score(model, tokenizer, asked, 4, seconds)
        assert len(scored) == written
        said = capsys.readouterr().out
        assert (f"{written} of 7 dev answers" in said and f"--eval_generate_seconds {seconds}" in said) if written < 7 else not said


def test_prompts_without_room_are_counted(llama, capsys):
    model, tokenizer = llama
    asked = dev_answers.questions(features(tokenizer), tokenizer, 99, encoder_decoder=False)
    longest = max(len(prompt) for prompt, _ in asked)
    dev_answers.score(model, tokenizer, asked, 256 - longest + 1, seconds=0.001)
    assert "1 prompt leaves no room" in capsys.readouterr().out


def test_processes_share_the_questions(llama, monkeypatch):
    """Each rank's share, joined, gives the scores of one process; a rank may have none."""
    model, tokenizer = llama
    asked = dev_answers.questions(features(tokenizer), tokenizer, 99, encoder_decoder=False)
    alone = dev_answers.score(model, tokenizer, asked, 6, 60)
    shares = []
    monkeypatch.setattr(dev_answers, "gather_object", lambda answers: shares.append(answers) or [a for share in shares for a in share])
    for rank in range(8):
        together = dev_answers.score(model, tokenizer, asked, 6, 60, rank, 8)
    assert sorted(map(len, shares)) == [0, 1, 1, 1, 1, 1, 1, 1] and together == alone


@pytest.mark.parametrize("recipe", ["full", "lora", "adalora", "prefix", "adapter"])
def test_training_takes_no_notice(recipe, tiny, data, tmp_path):
    """Weights, losses and gradients are the same bits with and without; the model has dropout, which draws random numbers."""
    runs = [run_recipe(recipe, tiny("gpt2"), data, tmp_path / name, *STEPS, *flags) for name, flags in (("without", ()), ("with", ANSWERS))]
    states = [{name: p.detach() for name, p in trainer.model.named_parameters()} for trainer in runs]
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())
    losses = [[(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e] for trainer in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    logged = [e for e in runs[1].state.log_history if "eval_loss" in e]
    assert len(logged) >= 3 and all({"eval_bleu", "eval_rougeL", "eval_chrf"} <= e.keys() for e in logged)
    assert not any("eval_bleu" in e for e in runs[0].state.log_history)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_pairs_and_the_best_checkpoint_by_what_is_written(kind, tiny, pairs, tmp_path):
    best = ("--metric_for_best_model", "chrf", "--early_stopping_patience", "9")
    trainer = run_recipe("full", tiny(kind), pairs, tmp_path / "run", "--task", "translate", *STEPS, "--max_steps", "6",
                         "--learning_rate", "1e-2", *ANSWERS, *best)
    values = [e["eval_chrf"] for e in trainer.state.log_history if "eval_chrf" in e]
    assert trainer.state.best_metric == max(values) and len(set(values)) > 1
    record = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert record["metrics"]["dev_chrf"] == max(values)


def test_two_processes_agree(tiny, data, tmp_path):
    """A real group of two, and the scores are those of the saved model in one process."""
    run = tmp_path / "run"
    result = shell(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", ROOT / "recipes/lora.py",
                   "--model", tiny("gpt2"), "--data", data, "--output_dir", run, "--max_length", "150", "--use_cpu", "--bf16", "False",
                   "--report_to", "none", *STEPS, *ANSWERS, "--learning_rate", "0.1", "--metric_for_best_model", "chrf",
                   "--greater_is_better", "True", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    assert result.code == 0, result.err
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert len([entry for entry in record["history"] if "eval_chrf" in entry]) == 4
    model, tokenizer = models.load_run(run, torch.float32), models.load_run_tokenizer(run)
    asked = dev_answers.questions(features(tokenizer), tokenizer, 5, encoder_decoder=False)
    expected = dev_answers.score(model, tokenizer, asked, 6, 60)
    assert expected["chrf"] > 0 and record["metrics"]["dev_chrf"] == pytest.approx(expected["chrf"])


@pytest.mark.parametrize(("flags", "parts"), [
    (("--metric_for_best_model", "bleu", "--greater_is_better", "True"), ["--metric_for_best_model bleu", "--eval_generate_rows"]),
    (("--metric_for_best_model", "eval_rougeL", "--eval_generate_rows", "4", "--greater_is_better", "False"),
     ["--metric_for_best_model rougeL", "worst", "--greater_is_better False"]),
    (("--task", "classify", "--metric_for_best_model", "f1"), ["--metric_for_best_model f1", "loss, accuracy, f1_macro"]),
    (("--task", "tag", "--eval_generate_rows", "4"), ["--eval_generate_rows is for --task chat or translate", "--task tag"]),
])
def test_what_can_t_be_is_refused(flags, parts, tiny, data, tmp_path):
    refused(call("recipes/lora.py", "--model", tiny("gpt2"), "--data", data, "--output_dir", tmp_path / "out", *flags), *parts,
            untouched=tmp_path / "out")
