"""Going on from a finished run, and replay with forgetting measured."""

import hashlib
import importlib
import json
import shutil
import sys

import accelerate
import numpy as np
import pytest
import torch
from conftest import DIALOGUES
from test_classify import ROWS
from test_cli import call
from test_methods import VARIANTS, Watched, logits, run_recipe
from test_resume import STEPS as TWELVE_STEPS
from test_resume import Interrupted, Killed, curve, same, trained

from recipes.common import models, runs
from recipes.common import trainer as trainer_module
from recipes.common.errors import UserError
from recipes.common.trainer import RecipeTrainer

SHORT = ("--max_steps", "2", "--learning_rate", "0.01", "--load_best_model_at_end", "False", "--eval_strategy", "no",
         "--save_strategy", "no")


def read(run):
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data folders of the chat task: first and second."""
    out = {}
    for name, rows in (("first", DIALOGUES[:2]), ("second", DIALOGUES[2:])):
        out[name] = tmp_path_factory.mktemp("data") / name
        out[name].mkdir()
        for split in ("train", "dev", "test"):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out[name] / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def parent(tiny, data, tmp_path_factory):
    made = {}

    def make(variant):
        if variant not in made:
            recipe, *flags = VARIANTS[variant]
            folder = tmp_path_factory.mktemp("parents") / variant
            made[variant] = folder, run_recipe(recipe, tiny("llama"), data["first"], folder, *flags, *SHORT)
        return made[variant]

    return make


def go_on(recipe, start, data, out, *flags, trainer_class=RecipeTrainer):
    """A run with --start_from, which excludes --model: the recipe's main() without run_recipe's own."""
    seen, finish = [], runs.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "finish", lambda trainer, *rest: (seen.append(trainer), finish(trainer, *rest)))
        patch.setattr(trainer_module, "RecipeTrainer", trainer_class)
        patch.setattr(sys, "argv", [f"recipes/{recipe}.py", "--start_from", str(start), "--data", str(data), "--output_dir", str(out),
                                    "--use_cpu", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True", *flags])
        importlib.import_module(f"recipes.{recipe}").main()
    return seen[0]


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "adalora"])
def test_a_run_goes_on_where_the_other_ended(variant, parent, data, tmp_path):
    """With a learning rate of zero the new run is the old one, whatever the method; with another it moves on from there."""
    folder, trainer = parent(variant)
    recipe, *flags = VARIANTS[variant]
    own = importlib.import_module(f"recipes.{recipe}").MethodArguments.peft_method
    assert own == (trainer.model.active_peft_config.peft_type if recipe != "full" else "")
    stand_still = ("--max_steps", "1", "--learning_rate", "0", "--load_best_model_at_end", "False", "--max_length", "150")
    same = go_on(recipe, folder, data["second"], tmp_path / "same", *flags, *stand_still)
    torch.testing.assert_close(logits(same.model.eval()), logits(trainer.model.eval()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(models.load_run(tmp_path / "same")), logits(trainer.model), rtol=1e-4, atol=1e-4)
    moved = go_on(recipe, folder, data["second"], tmp_path / "moved", *flags, *SHORT, "--max_length", "150")
    assert not torch.allclose(logits(moved.model.eval()), logits(trainer.model), atol=1e-3)
    [ancestor] = read(tmp_path / "moved")["lineage"]
    assert ancestor["run"] == str(folder) and ancestor["steps"] == 2
    assert ancestor["train_data"] == read(folder)["data"]["splits"]["train"]["sha256"]
    assert ancestor["train_data"] != read(tmp_path / "moved")["data"]["splits"]["train"]["sha256"]


def test_adalora_goes_on_with_the_ranks_it_has(tiny, data, tmp_path):
    """Ranks move even where nothing is learned, so what is compared is the model before its first step."""
    steps = ("--max_steps", "4", *SHORT[2:])
    first = run_recipe("adalora", tiny("llama"), data["first"], tmp_path / "one", *steps)
    assert importlib.import_module("recipes.adalora").MethodArguments.peft_method == first.model.active_peft_config.peft_type
    second = go_on("adalora", tmp_path / "one", data["second"], tmp_path / "two", *steps, "--max_length", "150", trainer_class=Watched)
    for name, parameter in first.model.named_parameters():
        torch.testing.assert_close(second.before[name], parameter)


def test_lineage_grows_and_a_new_method_may_build_on_a_whole_model(parent, data, tmp_path):
    folder, _ = parent("full")
    go_on("full", folder, data["second"], tmp_path / "two", *SHORT)
    go_on("lora", tmp_path / "two", data["first"], tmp_path / "three", *SHORT)
    assert [step["run"] for step in read(tmp_path / "three")["lineage"]] == [str(folder), str(tmp_path / "two")]
    loaded = models.load_run(tmp_path / "three")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "two")
    shutil.move(tmp_path / "two", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no such folder"):
        models.load_run(tmp_path / "three")


@pytest.mark.parametrize(("recipe", "flags", "wrong"), [
    ("adapter", (), "lora was made by the recipe lora: go on with that one$"),
    ("full", (), "lora was made by the recipe lora: go on with that one$"),
    ("lora", ("--rank", "4"), "lora was trained with --rank 8, not 4: go on in the same way$"),
    ("lora", ("--rank", "4", "--alpha", "3"), "was trained with --alpha 16, not 3, and with --rank 8, not 4: go on in the same way$"),
    ("lora", ("--use_dora",), "was trained with --use_dora False, not True"),
    ("lora", ("--target_modules", "q_proj"), "was trained with --target_modules all-linear, not q_proj:"),
    ("lora", ("--model", "smollm2"), "leave --model out"),
    ("lora", ("--task", "classify", "--label", "intent"), "was trained with --task chat, not classify: give --task chat$")])
def test_what_does_not_go_on_is_refused(recipe, flags, wrong, parent, data, tmp_path):
    folder, _ = parent("lora")
    rows = tmp_path / "not read" if recipe != "lora" else data["second"]  # another recipe is told before any row is read
    with pytest.raises(UserError, match=wrong):
        go_on(recipe, folder, rows, tmp_path / "run", *flags, *SHORT)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_told_by_its_own_flag(tiny, data, tmp_path):
    with pytest.raises(UserError, match="^--start_from .*nowhere: no run.json there"):
        go_on("lora", tmp_path / "nowhere", data["first"], tmp_path / "run", *SHORT)
    run_recipe("lora", tiny("llama"), data["first"], tmp_path / "first", "--max_steps", "1")
    with pytest.raises(UserError, match="^--start_from .*first/checkpoint-1 is a checkpoint of a run: name the run, .*first, which"):
        go_on("lora", tmp_path / "first" / "checkpoint-1", data["first"], tmp_path / "run", *SHORT)


def test_labels_are_those_of_the_run_that_is_continued(tiny, tmp_path, write_jsonl):
    first = write_jsonl(ROWS, "first.jsonl")
    run_recipe("full", tiny("bert"), first, tmp_path / "first", "--task", "classify", *SHORT)
    fewer = write_jsonl([row for row in ROWS if row["label"] != "lost_card"] * 2, "fewer.jsonl")
    go_on("full", tmp_path / "first", fewer, tmp_path / "two", "--task", "classify", *SHORT)
    assert list(read(tmp_path / "two")["data"]["labels"]) == list(read(tmp_path / "first")["data"]["labels"])
    more = write_jsonl([*ROWS, *({"text": "Will it rain?", "label": "weather"} for _ in range(3))], "more.jsonl")
    with pytest.raises(UserError, match="its labels do not include 'weather'"):
        go_on("full", tmp_path / "first", more, tmp_path / "three", "--task", "classify", *SHORT)
    several = write_jsonl([row | {"label": [row["label"]]} for row in ROWS], "several.jsonl")
    with pytest.raises(UserError, match="first was trained without --multi_label"):
        go_on("full", tmp_path / "first", several, tmp_path / "three", "--task", "classify", "--multi_label", *SHORT)


def test_the_task_is_that_of_the_run(tiny, data, tmp_path, write_jsonl, monkeypatch):
    """Said before the model is looked at, which would be told as one that can't chat."""
    file = write_jsonl(ROWS)
    for recipe, other in (("lora", "$"), ("full", ", or --model in place of --start_from")):
        run = tmp_path / recipe
        run_recipe(recipe, tiny("bert"), file, run, "--task", "classify", *SHORT)
        with monkeypatch.context() as patch:
            patch.setattr(models, "source_of_run", None)
            with pytest.raises(UserError, match=f"{recipe} was trained with --task classify, not chat: give --task classify{other}"):
                go_on(recipe, run, data["first"], tmp_path / "next", *SHORT)


def test_other_methods_settings_are_told_by_their_flags(tiny, parent, data, tmp_path):
    steps = ("--max_steps", "4", *SHORT[2:])
    run_recipe("adalora", tiny("llama"), data["first"], tmp_path / "ranks", *steps)
    for recipe, run, words, wrong in (
            ("adalora", tmp_path / "ranks", ("--every", "1"), "--every 10, not 1"),
            ("adalora", tmp_path / "ranks", ("--beta", "0.5"), "--beta 0.85, not 0.5"),
            ("prefix", parent("prefix-projection")[0], ("--prefix_projection", "--max_length", "150"), "_hidden_size 24, not 512"),
            ("lora", parent("adapter")[0], (), "was made by the recipe adapter")):
        with pytest.raises(UserError, match=wrong):
            go_on(recipe, run, data["second"], tmp_path / "next", *words, *steps)


def test_a_run_without_its_parameters_does_not_go_on(parent, data, tmp_path):
    run = shutil.copytree(parent("lora")[0], tmp_path / "run")
    for name in ("trained_parameters.safetensors", "adapter_config.json"):
        (run / name).unlink()
        with pytest.raises(UserError, match=f"run lacks {name}, without which"):
            go_on("lora", run, tmp_path / "not read", tmp_path / "next", *SHORT)


def test_an_adapter_s_head_sees_what_it_learned_from(tiny, tmp_path, write_jsonl):
    file, run = write_jsonl(ROWS), tmp_path / "run"
    run_recipe("lora", tiny("bert"), file, run, "--task", "classify", "--pooling", "mean", *SHORT)
    with pytest.raises(UserError, match="run was trained with --pooling mean, not cls: go on in the same way$"):
        go_on("lora", run, file, tmp_path / "next", "--task", "classify", *SHORT)
    go_on("lora", run, file, tmp_path / "next", "--task", "classify", "--pooling", "mean", *SHORT)


def test_the_head_of_the_run_is_not_told_as_a_new_one(tiny, tmp_path, write_jsonl, capsys):
    file, flags = write_jsonl(ROWS), ("--task", "classify", *SHORT)
    false = ("drawn at random", "the new head starts")
    first = run_recipe("adapter", tiny("bert"), file, tmp_path / "run", *flags)
    told = capsys.readouterr().out
    assert all(sentence in told for sentence in false)
    second = go_on("adapter", tmp_path / "run", file, tmp_path / "next", *flags, "--learning_rate", "0")
    told = capsys.readouterr().out
    assert not any(sentence in told for sentence in false)
    assert f"goes on from: {tmp_path / 'run'} (adapter, {first.state.global_step} steps)" in told
    assert same(trained(first.model), trained(second.model))
    models.load_run(tmp_path / "next", auto_class=second.task.auto_class, config=second.task.config)
    assert "drawn at random" not in capsys.readouterr().out


def test_rows_that_are_read_otherwise_than_before_are_noted(tiny, tmp_path, capsys):
    flags = ("--task", "classify", "--label", "intent", *SHORT)
    rows = [{"messages": [{"role": "user", "content": text, "intent": intent}, {"role": "assistant", "content": "Yes"}]}
            for text, intent in (("Hi", "a"), ("No", "b")) * 4]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_recipe("lora", tiny("bert"), file, tmp_path / "run", *flags, "--context_turns", "2")
    capsys.readouterr()
    other = ("--context_turns", "1", "--oos_label", "none")
    sentence = f"rows are read otherwise than in {tmp_path / 'run'}: --context_turns 1 (there: 2), --oos_label 'none' (there: not given)"
    go_on("lora", tmp_path / "run", file, tmp_path / "next", *flags, *other)
    assert f"note: {sentence}\n" in capsys.readouterr().out and sentence in read(tmp_path / "next")["data"]["notes"]
    go_on("lora", tmp_path / "run", file, tmp_path / "same", *flags, "--context_turns", "2")
    assert "read otherwise" not in capsys.readouterr().out


# Replay


def test_replay_mixes_a_share_in_and_measures_forgetting(tiny, data, tmp_path, write_jsonl, capsys):
    old = write_jsonl(DIALOGUES * 5, "old.jsonl")
    new = write_jsonl(DIALOGUES[:2] * 8, "new.jsonl")
    run_recipe("full", tiny("llama"), new, tmp_path / "run", "--replay", f"{old}:0.25", *SHORT, "--early_stopping_patience", "0")
    record = read(tmp_path / "run")
    train = record["data"]["splits"]["train"]
    assert train["rows"] == 19  # 14 new rows are left after two went to dev; a quarter of 19 is old
    assert any("replay: 5 of 18 rows" in note for note in train["notes"])
    assert record["forgetting"]["before"].keys() == record["forgetting"]["after"].keys() >= {"loss", "perplexity"}
    assert record["forgetting"]["before"]["loss"] != record["forgetting"]["after"]["loss"]
    assert "old rows, before -> after: loss" in capsys.readouterr().out


def test_forgetting_can_be_measured_without_replay(tiny, data, tmp_path):
    run_recipe("lora", tiny("gpt2"), data["first"], tmp_path / "run", "--measure_forgetting", str(data["second"]), *SHORT)
    record = read(tmp_path / "run")
    assert "forgetting" in record and record["data"]["splits"]["train"]["rows"] == 2 and record["data"]["splits"]["old"]["rows"] == 2


def test_all_labels_of_the_old_rows_are_known_whichever_are_drawn(tiny, tmp_path, write_jsonl, capsys):
    """Old dev rows may have labels that no row drawn has, which stopped the run."""
    old = write_jsonl([{"text": f"word {i}", "label": f"old {i % 9}"} for i in range(90)], "old.jsonl")
    new = write_jsonl(ROWS * 2, "new.jsonl")
    flags = ("--task", "classify", "--replay", f"{old}:0.2", "--class_weights", "balanced", *SHORT)
    trainer = run_recipe("full", tiny("bert"), new, tmp_path / "run", *flags)
    record = read(tmp_path / "run")
    counts = record["data"]["labels"]
    unseen = [label for label, n in counts.items() if n == 0]
    assert counts.keys() == {row["label"] for row in ROWS} | {f"old {i}" for i in range(9)} and 0 < len(unseen) < 9
    assert record["forgetting"]["after"]["loss"] > 0 and list(trainer.model.config.label2id) == list(counts)
    sentence = f"replay: {len(unseen)} labels of {old} without a row among those drawn, not learned ({', '.join(unseen[:5])}"
    assert sentence in capsys.readouterr().out and any(sentence in note for note in record["data"]["splits"]["train"]["notes"])
    assert np.mean(trainer.task.train["weights"]) == pytest.approx(1)  # labels without rows don't lower the weights of the others


def test_the_tags_of_old_rows_keep_their_order(tiny, tmp_path, write_jsonl):
    """O comes first: it stands for what the train rows lack."""
    old = write_jsonl([{"tokens": ["to", f"place{i}"], "tags": ["O", f"B-old{i}"]} for i in range(20)], "old.jsonl")
    new = write_jsonl([{"tokens": ["in", "Rome"], "tags": ["O", "B-city"]}] * 8, "new.jsonl")
    run_recipe("full", tiny("bert"), new, tmp_path / "run", "--task", "tag", "--replay", f"{old}:0.2", *SHORT)
    labels = list(read(tmp_path / "run")["data"]["labels"])
    assert labels[:3] == ["O", "B-city", "I-city"] and len(labels) == 3 + 2 * 18


@pytest.mark.parametrize("words", [("--replay", "x.jsonl"), ("--replay", "x.jsonl:1.5")])
def test_replay_needs_a_share(words, tiny, data, tmp_path):
    with pytest.raises(UserError, match="between 0 and 1"):
        run_recipe("full", tiny("gpt2"), data["first"], tmp_path / "run", *words, *SHORT)


def test_rows_that_are_trained_on_anyway_are_not_replayed(tiny, tmp_path, write_jsonl):
    file = write_jsonl(ROWS, "rows.jsonl")
    with pytest.raises(UserError, match="--replay .* holds the rows of --data"):
        run_recipe("full", tiny("bert"), file, tmp_path / "run", "--task", "classify", "--replay", f"{file}:0.25", *SHORT)
    assert not (tmp_path / "run").exists()


def test_max_train_samples_counts_the_mixture_and_keeps_its_shares(tiny, tmp_path, write_jsonl):
    """The first N rows would be new ones only."""
    old, new = write_jsonl(DIALOGUES * 5, "old.jsonl"), write_jsonl(DIALOGUES[:2] * 8, "new.jsonl")
    run_recipe("full", tiny("llama"), new, tmp_path / "run", "--replay", f"{old}:0.25", "--max_train_samples", "8", *SHORT)
    record = read(tmp_path / "run")
    train, replayed = record["data"]["splits"]["train"], record["data"]["replay"]
    assert train["rows"] == 8 and "2 of 18 rows" in train["notes"][-1] and train["notes"][-1].endswith("to 6")
    assert replayed["added"] == 2 and replayed["rows"] == 18 and replayed["sha256"] == hashlib.sha256(old.read_bytes()).hexdigest()


def test_too_few_old_rows_and_bad_ones_are_told(tiny, data, tmp_path, write_jsonl, capsys):
    old = write_jsonl([*DIALOGUES[2:] * 2, {"messages": "none"}], "old.jsonl")
    own = ("--replay", f"{old}:0.9", *SHORT)
    with pytest.raises(UserError, match="old.jsonl, row 5"):
        run_recipe("full", tiny("llama"), data["first"], tmp_path / "run", *own)
    run_recipe("full", tiny("llama"), data["first"], tmp_path / "run", *own, "--on_bad_row", "skip")
    train = read(tmp_path / "run")["data"]["splits"]["train"]
    assert "3 of 3 rows" in train["notes"][-1] and "as there are no 18" in train["notes"][-1]
    assert [str(old) in sentence and "row 5" in sentence for sentence in train["bad_rows"]] == [True]
    assert f"skipped {old}, row 5" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--replay", "no-such.jsonl:0.2"), ("--measure_forgetting", "no-such.jsonl")])
def test_a_source_of_old_rows_that_is_not_there_is_told_by_its_own_flag(words, tiny, data, tmp_path):
    with pytest.raises(UserError, match=f"^{words[0]} no-such.jsonl: no such file"):
        run_recipe("full", tiny("gpt2"), data["first"], tmp_path / "run", *words, *SHORT)


def test_measuring_changes_nothing(tiny, data, tmp_path):
    """GPT-2 has dropout, so that a training tells whether random numbers were drawn before it."""
    flags = ("--measure_forgetting", str(data["second"]))
    runs = [run_recipe("lora", tiny("gpt2"), data["first"], tmp_path / f"run{i}", *own, *SHORT) for i, own in enumerate([(), flags])]
    assert same(trained(runs[0].model), trained(runs[1].model))


def test_forgetting_is_the_loss_of_the_model_before_and_after(tiny, data, tmp_path):
    run_recipe("full", tiny("llama"), data["first"], tmp_path / "run", "--measure_forgetting", str(data["second"]), *SHORT)
    measured = read(tmp_path / "run")["forgetting"]
    file = data["second"] / "dev.jsonl"
    call("scripts/evaluate.py", "--run", tmp_path / "run", "--base", "--data", file, "--dtype", "float32", "--max_new_tokens", "2")
    [scores] = read(tmp_path / "run")["evaluation"].values()
    loss = {row["model"]: row["values"][0] for row in scores["table"] if row["language"] == "all"}
    assert list(loss.values()) == pytest.approx([measured["before"]["loss"], measured["after"]["loss"]], rel=1e-5)


def test_a_run_that_goes_on_resumes_exactly(parent, data, tmp_path):
    """With old rows replayed and measured: the state before is that of the start, not that of the checkpoint."""
    folder, _ = parent("lora")
    flags = ("--replay", f"{data['first']}:0.5", "--max_length", "150", *TWELVE_STEPS, "--max_steps", "12")
    through = go_on("lora", folder, data["second"], tmp_path / "through", *flags)
    with pytest.raises(Killed):
        go_on("lora", folder, data["second"], tmp_path / "killed", *flags, trainer_class=Interrupted)
    resumed = go_on("lora", folder, data["second"], tmp_path / "killed", *flags, "--resume_from_checkpoint")
    assert len(curve(through, "loss")) == 12 and curve(resumed, "loss") == curve(through, "loss")
    assert same(trained(resumed.model), trained(through.model))
    assert read(tmp_path / "killed")["forgetting"] == read(tmp_path / "through")["forgetting"]
    assert read(tmp_path / "killed")["lineage"] == read(tmp_path / "through")["lineage"]


class ScoresFirst(RecipeTrainer):
    """Broken: scored as soon as the Trainer is there."""

    def train(self, **kwargs):
        self.predict(self.task.old)
        return super().train(**kwargs)


def test_the_model_is_made_ready_for_training_before_it_is_scored(tiny, data, tmp_path, monkeypatch):
    """Accelerate prepares a model once: one that is scored first is never wrapped, so that several processes don't share gradients."""
    plain, scored_only = accelerate.Accelerator.prepare_model, []

    def prepare(self, model, device_placement=None, evaluation_mode=False):
        scored_only.append(evaluation_mode)
        return plain(self, model, device_placement, evaluation_mode)

    monkeypatch.setattr(accelerate.Accelerator, "prepare_model", prepare)
    flags = ("--measure_forgetting", str(data["second"]), *SHORT)
    run_recipe("lora", tiny("gpt2"), data["first"], tmp_path / "run", *flags)
    assert scored_only[0] is False
    scored_only.clear()
    run_recipe("lora", tiny("gpt2"), data["first"], tmp_path / "broken", *flags, trainer_class=ScoresFirst)
    assert scored_only[0] is True


def test_what_was_not_measured_at_the_start_is_not_made_up_later(tiny, data, tmp_path):
    steps = ("--max_steps", "4", "--save_steps", "2", "--save_strategy", "steps", "--eval_strategy", "no",
             "--load_best_model_at_end", "False")
    run_recipe("lora", tiny("gpt2"), data["first"], tmp_path / "plain", *steps)
    with pytest.raises(UserError, match="did not measure forgetting before its first step"):
        run_recipe("lora", tiny("gpt2"), data["first"], tmp_path / "run", *steps, "--measure_forgetting", str(data["second"]),
                   "--resume_from_checkpoint", str(tmp_path / "plain" / "checkpoint-2"), "--allow_changed", "measure_forgetting,rows")
