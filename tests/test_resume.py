"""Runs that are interrupted and resumed, or that end with their best checkpoint: each recipe's main() on a tiny GPT-2 with dropout."""

import functools
import json

import pytest
import torch
from conftest import DIALOGUES
from safetensors.torch import load_file
from test_methods import run_recipe
from transformers import TrainerCallback

from recipes.common.errors import UserError
from recipes.common.trainer import RecipeTrainer

VARIANTS = {
    "lora": ("lora", "--dropout", "0.1"),
    "lora-dora": ("lora", "--use_dora"),
    "lora-rslora": ("lora", "--use_rslora", "--dropout", "0.1"),
    "lora-dora-rslora": ("lora", "--use_dora", "--use_rslora"),
    "prefix": ("prefix",),
    "prefix-projection": ("prefix", "--prefix_projection", "--projection_hidden_size", "24"),
    "adapter": ("adapter", "--dropout", "0.1"),
    "adalora": ("adalora", "--init_rank", "4", "--target_rank", "2", "--every", "1", "--last_share", "0.2"),
    "adalora-final": ("adalora", "--init_rank", "4", "--target_rank", "2", "--every", "1", "--last_share", "0.5"),
    "full": ("full",),
    "full-top": ("full", "--train_top_layers", "1"),
}
# 11 rows in steps of 2: six steps an epoch, the last of them partial; twelve in all, a checkpoint after every second.
STEPS = ("--num_train_epochs", "2", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--logging_steps", "1",
         "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2",
         "--load_best_model_at_end", "False", "--learning_rate", "0.01")


class Killed(Exception):
    """Stands for a power cut."""


class KillInStep9(TrainerCallback):
    """Step 9 of 12, in the middle of the second epoch, between the two rows of the step; the last checkpoint is that of step 8."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise Killed


class Interrupted(RecipeTrainer):
    def __init__(self, *, callbacks, **kwargs):
        super().__init__(callbacks=[*callbacks, KillInStep9()], **kwargs)


class Remembers(RecipeTrainer):
    """Keeps the trained parameters as they were at each checkpoint."""

    def _save_checkpoint(self, *args, **kwargs):
        self.at = getattr(self, "at", {})
        self.at[self.state.global_step] = trained(self.model)
        super()._save_checkpoint(*args, **kwargs)


class ForgetsTheWeights(RecipeTrainer):
    """Broken: resumes the optimizer and the place in the data, but with the weights that training started from."""

    def _load_from_checkpoint(self, *args, **kwargs):
        pass


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def curve(trainer, key):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = (DIALOGUES * 3)[:11]
    for split, own in (("train", rows), ("dev", DIALOGUES[:2])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def killed(tiny, data, tmp_path_factory):
    """killed("lora") -> the folder of a run that died in step 9 of 12; a fresh one at each call."""
    def make(variant, *flags):
        recipe, *own = VARIANTS[variant]
        folder = tmp_path_factory.mktemp("killed") / "run"
        with pytest.raises(Killed):
            run_recipe(recipe, tiny("gpt2"), data, folder, *own, *STEPS, *flags, trainer_class=Interrupted)
        assert not (folder / "run.json").exists()
        return folder

    return make


@pytest.fixture(scope="module")
def some_killed(killed):
    """Like `killed`, but one folder for all who only read its checkpoints."""
    return functools.cache(killed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_and_resumed_equals_uninterrupted(variant, killed, tiny, data, tmp_path, capsys):
    recipe, *own = VARIANTS[variant]
    # The bare flag takes the newest checkpoint of the run folder; without one, it starts at the beginning and says so.
    through = run_recipe(recipe, tiny("gpt2"), data, tmp_path / "through", *own, *STEPS, "--resume_from_checkpoint")
    assert "through holds no whole checkpoint: starting at step 0" in capsys.readouterr().out
    folder = killed(variant)
    resumed = run_recipe(recipe, tiny("gpt2"), data, folder, *own, *STEPS, "--resume_from_checkpoint")
    assert f"resuming from {folder / 'checkpoint-8'}" in capsys.readouterr().out
    assert len(curve(through, "loss")) == 12
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert curve(resumed, key) == curve(through, key)
    assert same(trained(resumed.model), trained(through.model))
    weights = "model.safetensors" if recipe == "full" else "adapter_model.safetensors"
    assert same(load_file(folder / weights), load_file(tmp_path / "through" / weights))
    counts = [json.loads((run / "run.json").read_text(encoding="utf-8"))["tokens"] for run in (folder, tmp_path / "through")]
    assert counts[0] == counts[1]


def test_a_resume_that_forgets_the_weights_is_caught(killed, tiny, data, tmp_path):
    recipe, *own = VARIANTS["prefix-projection"]
    through = run_recipe(recipe, tiny("gpt2"), data, tmp_path / "through", *own, *STEPS)
    resumed = run_recipe(recipe, tiny("gpt2"), data, killed("prefix-projection"), *own, *STEPS, "--resume_from_checkpoint",
                         trainer_class=ForgetsTheWeights)
    assert curve(resumed, "loss") != curve(through, "loss")


def test_a_checkpoint_whose_writing_was_interrupted_is_passed_over(killed, tiny, data, tmp_path, capsys):
    folder = killed("lora")
    recipe, *own = VARIANTS["lora"]
    for name in ("trainer_state.json", "trained_parameters.safetensors"):  # what a kill in the middle of a save leaves out
        (folder / "checkpoint-8" / name).unlink()
    with pytest.raises(UserError, match="checkpoint-8: trained_parameters.safetensors is missing"):
        run_recipe(recipe, tiny("gpt2"), data, tmp_path / "new", *own, *STEPS, "--resume_from_checkpoint", str(folder / "checkpoint-8"))
    resumed = run_recipe(recipe, tiny("gpt2"), data, folder, *own, *STEPS, "--resume_from_checkpoint")
    said = capsys.readouterr().out
    assert f"{folder / 'checkpoint-8'} is passed over: trained_parameters.safetensors is missing" in said
    assert f"resuming from {folder / 'checkpoint-6'}" in said
    through = run_recipe(recipe, tiny("gpt2"), data, tmp_path / "through", *own, *STEPS)
    assert same(trained(resumed.model), trained(through.model))


def test_a_damaged_checkpoint_is_told_in_a_sentence(killed, tiny, data):
    folder = killed("lora")
    recipe, *own = VARIANTS["lora"]
    file = folder / "checkpoint-8/trained_parameters.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="checkpoint-8: trained_parameters.safetensors has 100 bytes where"):
        run_recipe(recipe, tiny("gpt2"), data, folder, *own, *STEPS, "--resume_from_checkpoint", str(file.parent))


def test_a_named_checkpoint_can_be_resumed_into_a_new_folder(some_killed, tiny, data, tmp_path):
    checkpoints = {int(path.name.split("-")[1]): path for path in some_killed("lora").glob("checkpoint-*")}
    assert sorted(checkpoints) == [6, 8]  # save_total_limit keeps two
    recipe, *own = VARIANTS["lora"]
    runs = [run_recipe(recipe, tiny("gpt2"), data, tmp_path / str(step), *own, *STEPS, "--resume_from_checkpoint", str(path))
            for step, path in checkpoints.items()]
    assert curve(runs[0], "loss") == curve(runs[1], "loss")
    assert same(trained(runs[0].model), trained(runs[1].model))


def test_the_loss_at_the_end_is_the_mean_over_the_steps_since_the_resume(tiny, data, tmp_path):
    """Also where the checkpoint lies between two lines of the log, so that losses of before go into the next line."""
    steps = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no", "--learning_rate", "0.01")
    each = curve(run_recipe("lora", tiny("gpt2"), data, tmp_path / "each", *steps, "--logging_steps", "1"), "loss")
    run_recipe("lora", tiny("gpt2"), data, tmp_path / "first", *steps, "--logging_steps", "3")
    resumed = run_recipe("lora", tiny("gpt2"), data, tmp_path / "second", *steps, "--logging_steps", "3", "--resume_from_checkpoint",
                         str(tmp_path / "first" / "checkpoint-2"))
    assert curve(resumed, "loss")[3] == pytest.approx((each[1] + each[2] + each[3]) / 3, abs=1e-4)
    assert curve(resumed, "train_loss")[4] == pytest.approx((each[3] + each[4]) / 2, abs=1e-4)


# Without steps at the final ranks, AdaLoRA has one checkpoint to choose from, the last.
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "adalora"])
def test_the_best_checkpoint_is_restored_exactly(variant, tiny, write_jsonl, tmp_path):
    recipe, *own = VARIANTS[variant]
    # Learning English makes Chinese less likely: the dev loss rises before the end.
    for split, row in (("train", DIALOGUES[0]), ("dev", DIALOGUES[3])):
        write_jsonl([row] * 11, f"{split}.jsonl")
    flags = (*own, *STEPS, "--load_best_model_at_end", "True", "--lr_scheduler_type", "constant",
             "--learning_rate", "0.5" if recipe == "adalora" else "0.05")  # E starts at zero and meets A and B at their first size
    trainer = run_recipe(recipe, tiny("gpt2"), tmp_path, tmp_path / "run", *flags, trainer_class=Remembers)
    scores = {step: loss for step, loss in curve(trainer, "eval_loss").items() if step in trainer.at}
    if recipe == "adalora":  # the best of those that have the final ranks
        config = trainer.model.peft_config["default"]
        scores = {step: loss for step, loss in scores.items() if step >= config.total_step - config.tfinal}
    best = min(scores, key=scores.get)
    assert best != max(scores) and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert same(trained(trainer.model), trainer.at[best])
    assert not same(trained(trainer.model), trainer.at[max(scores)])
    assert trainer.state.log_history[-1]["eval_loss"] == pytest.approx(scores[best], rel=1e-12)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["metrics"]["dev_loss"] == pytest.approx(scores[best], rel=1e-12)


@pytest.mark.parametrize(("written_by", "recipe", "flags"), [
    ("lora", "adapter", ()), ("lora", "prefix", ()), ("lora", "full", ()), ("full", "lora", ()), ("full", "prefix", ()),
    ("prefix", "prefix", ("--prefix_projection",)), ("prefix-projection", "prefix", ()),
    ("adapter", "adapter", ("--placement", "pfeiffer")), ("lora", "lora", ("--rank", "4")),
    ("prefix", "prefix", ("--num_virtual_tokens", "7")),
])
def test_the_checkpoint_of_another_method_is_refused(written_by, recipe, flags, some_killed, tiny, data, tmp_path):
    checkpoint = some_killed(written_by) / "checkpoint-8"
    with pytest.raises(UserError, match="checkpoint-8 .*resume with the"):
        run_recipe(recipe, tiny("gpt2"), data, tmp_path / "run", *flags, *STEPS, "--resume_from_checkpoint", str(checkpoint))
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_prefix_of_one_token_is_not_spread_over_many(tiny, data, tmp_path):
    """Shapes that PyTorch would broadcast without a word."""
    run_recipe("prefix", tiny("gpt2"), data, tmp_path / "one", "--num_virtual_tokens", "1", *STEPS, "--max_steps", "2")
    with pytest.raises(UserError, match="with other settings"):
        run_recipe("prefix", tiny("gpt2"), data, tmp_path / "many", *STEPS, "--resume_from_checkpoint", str(tmp_path / "one/checkpoint-2"))


def test_a_checkpoint_that_does_not_exist_is_refused(tiny, data, tmp_path):
    with pytest.raises(UserError, match="no-such: there is no such folder"):
        run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--resume_from_checkpoint", str(tmp_path / "no-such"))


@pytest.mark.parametrize("written", ["run.json", "checkpoint-2/trainer_state.json"])
def test_a_folder_that_holds_another_run_is_refused(written, tiny, data, tmp_path):
    folder = tmp_path / "run"
    (folder / written).parent.mkdir(parents=True)
    (folder / written).write_text("{}", encoding="utf-8")
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="holds another run: choose a new name.*--resume_from_checkpoint"):
        run_recipe("lora", tiny("gpt2"), data, folder, *STEPS)
    assert sorted(folder.rglob("*")) == before and (folder / written).read_text(encoding="utf-8") == "{}"


def test_an_output_dir_that_is_a_file_is_refused(tiny, data, tmp_path):
    (tmp_path / "run").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="run is a file: name a folder"):
        run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS)
