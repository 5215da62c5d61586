"""AdaLoRA: the budget is met, ranks differ, what is saved is what was trained, and the planned steps are the Trainer's."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import DIALOGUES
from test_methods import run_recipe
from transformers import AutoModelForCausalLM

from recipes.common import models, rank_allocation, report, runs
from recipes.common.errors import UserError
from recipes.common.trainer import RecipeTrainer

PICTURES = True
FLAGS = ("--init_rank", "4", "--target_rank", "2", "--every", "1", "--logging_steps", "1", "--save_strategy", "no", "--eval_strategy", "no",
         "--load_best_model_at_end", "False", "--learning_rate", "0.01", "--per_device_train_batch_size", "1", "--max_steps", "10")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DIALOGUES), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(tiny, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adalora") / "run"
    return folder, run_recipe("adalora", tiny("llama"), data, folder, *FLAGS)


def callback(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, rank_allocation.AllocateRanks))


def test_ranks_differ_and_the_budget_is_met_exactly(finished):
    ranks = callback(finished[1]).ranks()
    assert len(ranks) == 14 and sum(ranks.values()) == 2 * 14 and len(set(ranks.values())) > 1
    pattern = json.loads((finished[0] / "adapter_config.json").read_text(encoding="utf-8"))["rank_pattern"]
    assert sorted(map(sum, pattern.values())) == sorted(ranks.values())


class GetsWorse(RecipeTrainer):
    """Each evaluation is worse than the one before it."""

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = float(self.state.global_step)
        return output


def test_the_best_checkpoint_is_one_that_meets_the_budget(tiny, data, tmp_path, capsys):
    flags = (*FLAGS, "--save_strategy", "steps", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1",
             "--load_best_model_at_end", "True")
    trainer = run_recipe("adalora", tiny("llama"), data, tmp_path / "run", *flags, trainer_class=GetsWorse)
    assert trainer.state.best_global_step == 7  # the first one with the final ranks, and not the first one
    assert sum(callback(trainer).ranks().values()) == 2 * 14
    capsys.readouterr()
    early = run_recipe("adalora", tiny("llama"), data, tmp_path / "early", *flags, "--early_stopping_patience", "2",
                       trainer_class=GetsWorse)
    assert early.state.global_step == 3 and "the training ended before the budget was met" in capsys.readouterr().out


def test_without_the_callback_it_would_be_plain_lora(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_allocation.AllocateRanks, "on_optimizer_step", lambda *args, **kwargs: None)
    trainer = run_recipe("adalora", tiny("llama"), data, tmp_path / "run", *FLAGS)
    assert set(callback(trainer).ranks().values()) == {4}


@torch.no_grad()
def test_saved_loaded_and_merged_give_equal_logits(finished, tiny):
    folder, trainer = finished
    ids = torch.arange(5, 25)[None]
    trained = trainer.model.eval()(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))(input_ids=ids).logits
    assert (trained - base).abs().max() > 1e-2
    torch.testing.assert_close(models.load_run(folder)(input_ids=ids).logits, trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(models.load_run(folder, merge=True)(input_ids=ids).logits, trained, atol=1e-5, rtol=0)


def test_no_false_alarm_is_raised(tiny, data, tmp_path, recwarn):
    """A matrix that lost its last rank is saved and loaded as it is: PEFT's warnings about it are none of the user's."""
    flags = (*FLAGS, "--init_rank", "2", "--target_rank", "1", "--learning_rate", "0.05")
    trainer = run_recipe("adalora", tiny("llama"), data, tmp_path / "run", *flags)
    assert 0 in callback(trainer).ranks().values()
    models.load_run(tmp_path / "run")
    said = [str(warning.message) for warning in recwarn]
    assert not [text for text in said if "rank_pattern" in text or "invalid shape" in text]
    warnings.warn("Adapter 'default': 1 LoRA tensor(s) have invalid shape: layers.0.lora_A:(0,). A 1-D or zero-sized", stacklevel=1)
    warnings.warn("The following rank_pattern keys did not match any targeted module: ['q_proj']", RuntimeWarning, stacklevel=1)
    assert len(recwarn) == len(said) + 2  # what they warn of otherwise is still told


def test_the_orthogonality_term_has_its_closed_form_gradient():
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    distance = rank_allocation._distance_to_orthogonal(rows)
    gradient, = torch.autograd.grad(distance, rows)
    error = rows @ rows.T - torch.eye(3)
    torch.testing.assert_close(gradient, 2 * error @ rows / distance)
    assert rank_allocation._distance_to_orthogonal(torch.eye(3, 8)) == 0


@pytest.mark.parametrize("flags", [
    (), ("--max_steps", "3"), ("--per_device_train_batch_size", "3"), ("--gradient_accumulation_steps", "3"),
    ("--num_train_epochs", "2.5", "--gradient_accumulation_steps", "2"), ("--per_device_train_batch_size", "3", "--dataloader_drop_last")])
def test_planned_steps_are_the_trainers(flags, tiny, data, tmp_path):
    own = ("--per_device_train_batch_size", "1", "--num_train_epochs", "2")
    trainer = run_recipe("lora", tiny("llama"), data, tmp_path / "run", *own, *flags)
    assert runs.steps(len(trainer.train_dataset), trainer.args) == trainer.state.max_steps


@pytest.mark.parametrize("processes, steps", [(1, 10), (2, 6), (3, 4)])  # 10 rows; the last round is filled up
def test_planned_steps_of_several_processes(processes, steps):
    training = SimpleNamespace(max_steps=-1, dataloader_drop_last=False, train_batch_size=2, world_size=processes,
                               gradient_accumulation_steps=1, num_train_epochs=2)
    assert runs.steps(10, training) == steps


@pytest.mark.parametrize("flags, words", [
    (("--target_rank", "4"), "--target_rank 4"), (("--first_share", "0.8"), "--first_share 0.8"), (("--max_steps", "1"), "too few")])
def test_refused(flags, words, tiny, data, tmp_path):
    with pytest.raises(UserError, match=words):
        run_recipe("adalora", tiny("llama"), data, tmp_path / "run", *FLAGS, *(("--last_share", "0.3") if "0.8" in flags else ()), *flags)


def test_the_picture_of_the_ranks_holds_every_matrix():
    llama = {"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 0, "model.layers.1.self_attn.q_proj": 5}
    names, blocks, grid, others = report.rank_grid(llama)
    assert (names, blocks, others) == (["mlp.up_proj", "self_attn.q_proj"], [0, 1], {})
    assert grid[0] == [3, 0] and math.isnan(grid[1][0]) and grid[1][1] == 5
    t5 = {"encoder.block.0.layer.0.SelfAttention.q": 3, "decoder.block.0.layer.0.SelfAttention.q": 9}
    assert report.rank_grid(t5)[::2] == (["encoder layer.0.SelfAttention.q", "decoder layer.0.SelfAttention.q"], [[3], [9]])
    bert = {"bert.encoder.layer.0.output.dense": 2, "bert.pooler.dense": 4}
    assert report.rank_grid(bert)[3] == {"bert.pooler.dense": 4} and "bert.pooler.dense: 4" in report.ranks(bert)
    assert report.ranks({}) == ""


def test_a_run_reports_its_ranks(finished):
    folder, _ = finished
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert sum(record["method_report"]["rank_pattern"].values()) == 2 * 14
    assert "Where the ranks went" in (folder / "report.html").read_text(encoding="utf-8")
