"""Whose a run folder is: one training at a time, nothing of the user's touched, totals over all lives of a run, what is written last."""

import json
import os
import signal
import socket
import time

import pytest
import torch
from conftest import DIALOGUES
from test_checkpoints import STEPS, acting, same_end
from test_methods import run_recipe
from transformers import GenerationConfig

from recipes.common import checkpoints, run_folder, runs
from recipes.common.errors import UserError
from recipes.common.trainer import RecipeTrainer


class Killed(Exception):
    """Stands for a power cut."""


def die():
    raise Killed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, own in (("train", (DIALOGUES * 2)[:5]), ("dev", DIALOGUES[:2])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own), encoding="utf-8")
    return folder


@pytest.fixture
def train(tiny, data):
    """train(folder, "--seed", "7") -> the Trainer of a LoRA run of nine steps, a checkpoint after every second."""
    def make(folder, *flags, recipe="lora", **kwargs):
        own = ("--save_total_limit", "9", *flags)
        steps = [word for word in STEPS if recipe == "lora" or word not in ("--dropout", "0.1")]
        return run_recipe(recipe, tiny("gpt2"), data, folder, *steps, *own, **kwargs)
    return make


@pytest.fixture
def killed(train, tmp_path):
    """killed(step) -> the folder of a run that died at the end of that step."""
    def make(step=5, *flags):
        folder = tmp_path / "run"
        with pytest.raises(Killed):
            train(folder, *flags, trainer_class=acting(step, die))
        return folder
    return make


def record(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# One training at a time


def holder(folder, *, with_child=False):
    """A process that holds the lock of `folder` until it is killed; with a child of its own that lives on."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            with run_folder.locked(folder):
                child = os.fork() if with_child else 1
                if child:
                    os.write(writer, f"{child}\n".encode())
                time.sleep(60)
        finally:
            os._exit(0)
    os.close(writer)
    return pid, int(os.read(reader, 20))


@pytest.mark.parametrize("resume", [(), ("--resume_from_checkpoint",)])
def test_a_second_training_in_the_same_folder_is_refused_while_the_first_lives(resume, train, tmp_path):
    folder = tmp_path / "run"
    pid, _ = holder(folder)
    try:
        with pytest.raises(UserError, match=f"{folder}: another training writes there .process {pid} on {socket.gethostname()}"):
            train(folder, *resume)
        assert [path.name for path in folder.iterdir()] == [run_folder.LOCK]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    train(folder, *resume, "--max_steps", "1")  # the kernel freed the lock
    assert (folder / "run.json").is_file() and not (folder / run_folder.LOCK).exists()


def test_a_process_that_reads_data_does_not_hold_the_lock_of_a_killed_training(train, tmp_path):
    pid, child = holder(tmp_path / "run", with_child=True)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        train(tmp_path / "run", "--max_steps", "1")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_training_that_is_refused_leaves_no_folder(train, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train(tmp_path / "deep/er/run", "--data", str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


# What is not ours


def write(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", ["notes.txt", "adapter_config.json", "unfinished/notes.txt", "checkpoint-2/model.safetensors",
                                  "start/notes.txt", "checkpoint-2"])
@pytest.mark.parametrize("resume", [(), ("--resume_from_checkpoint",)])
def test_a_folder_with_files_of_others_is_refused_and_left_as_it_is(name, resume, train, tmp_path):
    folder = tmp_path / "mine"
    write(folder / name)
    with pytest.raises(UserError, match=f"--output_dir {folder} holds (files that are no run's|another run)"):
        train(folder, *resume)
    assert contents(folder) == {name: b"mine"}


def test_notes_in_a_run_folder_stay_and_what_is_in_the_way_is_set_aside(killed, train, tmp_path, capsys):
    folder = killed(5)
    mine = ("notes.txt", "README.md", "report.html", "checkpoint-6/model.safetensors")
    for name in mine:
        write(folder / name)
    train(folder, "--resume_from_checkpoint")
    after = contents(folder)
    for name in ("notes.txt", "README.md.set-aside-1", "report.html.set-aside-1", "checkpoint-6.set-aside-1/model.safetensors"):
        assert after[name] == b"mine"
    assert f"note: {folder}/README.md was there already: it is now README.md.set-aside-1" in capsys.readouterr().out
    assert checkpoints.fault(folder / "checkpoint-6") is None
    train(tmp_path / "through")
    assert same_end(folder, tmp_path / "through")


def test_a_note_in_the_stage_refuses_a_resume(killed, train):
    folder = killed(5)
    write(folder / "unfinished/notes.txt")
    with pytest.raises(UserError, match="no run's .unfinished/notes.txt"):
        train(folder, "--resume_from_checkpoint")
    assert (folder / "unfinished/notes.txt").is_file()


def test_a_note_put_in_the_stage_while_training_stays(train, tmp_path):
    train(tmp_path / "run", trainer_class=acting(3, lambda: write(tmp_path / "run/unfinished/notes.txt")))
    assert contents(tmp_path / "run/unfinished") == {"notes.txt": b"mine"}


@pytest.mark.parametrize(("recipe", "flags", "named"), [
    ("full", (), "recipe was lora, now full"), ("lora", ("--task", "pretrain"), "task was chat, now pretrain"),
    ("lora", ("--model", "other"), "model was .*gpt2.*, now .*other")])
def test_the_run_of_another_recipe_task_or_model_is_refused_by_name(recipe, flags, named, killed, train, tiny, tmp_path):
    folder = killed(3)
    if "other" in flags:
        (tmp_path / "other").symlink_to(tiny("gpt2"))
        flags = ("--model", str(tmp_path / "other"))
    before = contents(folder)
    with pytest.raises(UserError, match=rf"checkpoint-2 was written with other settings \({named}"):
        train(folder, "--resume_from_checkpoint", *flags, recipe=recipe)
    assert contents(folder) == before


def test_a_resume_from_elsewhere_into_the_folder_of_another_run_is_refused(killed, train, tmp_path):
    folder = killed(3)
    train(tmp_path / "other", "--max_steps", "2")
    before = contents(folder)
    with pytest.raises(UserError, match=f"{folder} holds another run than {tmp_path}/other/checkpoint-2: name a new folder"):
        train(folder, "--resume_from_checkpoint", str(tmp_path / "other/checkpoint-2"))
    assert contents(folder) == before


# What an earlier life left


def test_a_run_that_goes_back_sets_later_checkpoints_aside(killed, train, capsys):
    folder = killed(5)
    back = ("--resume_from_checkpoint", str(folder / "checkpoint-2"))
    with pytest.raises(Killed):
        train(folder, *back, trainer_class=acting(3, die))
    assert (folder / "checkpoint-4.set-aside-1").is_dir() and not (folder / "checkpoint-4").exists()
    train(folder, "--resume_from_checkpoint")
    assert f"resuming from {folder}/checkpoint-2" in capsys.readouterr().out
    assert checkpoints.fault(folder / "checkpoint-4") is None and (folder / "checkpoint-4.set-aside-1").is_dir()


def test_a_final_model_of_a_killed_life_is_never_mixed_with_a_new_one(train, tmp_path):
    """Killed between the model and run.json. Without a checkpoint nothing says whose the files are."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs, "write", lambda *given: die())
        train(tmp_path / "run", "--save_strategy", "no")
    before = contents(tmp_path / "run")
    assert "adapter_model.safetensors" in before
    for resume in ((), ("--resume_from_checkpoint",)):
        with pytest.raises(UserError, match="holds files that are no run's"):
            train(tmp_path / "run", *resume)
    assert contents(tmp_path / "run") == before


def test_a_life_that_was_killed_before_its_run_json_is_finished(train, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs, "write", lambda *given: die())
        train(tmp_path / "run")
    train(tmp_path / "run", "--resume_from_checkpoint")
    assert (tmp_path / "run/run.json").is_file()
    assert not list((tmp_path / "run").rglob("*.set-aside-*"))  # the same files once more


def test_a_resume_by_name_that_is_given_again_goes_on_in_the_new_folder(killed, train, tmp_path, capsys):
    named = ("--resume_from_checkpoint", str(killed(3) / "checkpoint-2"))
    with pytest.raises(Killed):
        train(tmp_path / "on", *named, trainer_class=acting(7, die))
    train(tmp_path / "on", *named)
    said = capsys.readouterr().out
    assert f"note: {tmp_path}/on went on from {named[1]} already" in said and f"resuming from {tmp_path}/on/checkpoint-6" in said
    train(tmp_path / "through")
    assert same_end(tmp_path / "on", tmp_path / "through") and record(tmp_path / "on")["resumes"] == 2


# Totals


def test_totals_are_of_all_lives(train, tmp_path):
    class Slow(acting(3, lambda: time.sleep(2))):
        pass

    class SlowAndKilled(acting(5, die), Slow):
        pass

    folder, pairs = tmp_path / "run", ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1")
    for trainer_class in (SlowAndKilled, acting(5, die)):  # the second life ends before its first checkpoint
        with pytest.raises(Killed):
            train(folder, *pairs, "--resume_from_checkpoint", trainer_class=trainer_class)
    train(folder, *pairs, "--resume_from_checkpoint")
    train(tmp_path / "through", *pairs)
    run, through = record(folder), record(tmp_path / "through")
    assert run["resumes"] == 2 and through["resumes"] == 0
    assert 2 < run["seconds"] < 2 + 5 * through["seconds"] + 2
    assert run["tokens"] == through["tokens"] and run["tokens_per_second"] == pytest.approx(run["tokens"] / run["seconds"], rel=0.05)
    assert run["padding_share"] == through["padding_share"] > 0
    assert not (folder / checkpoints.LIVES).exists()


def test_a_life_that_began_anew_counts_too(train, tmp_path):
    with pytest.raises(Killed):
        train(tmp_path / "run", trainer_class=acting(1, die))
    train(tmp_path / "run", "--resume_from_checkpoint", "--max_steps", "2")
    assert record(tmp_path / "run")["resumes"] == 1


def test_max_minutes_counts_earlier_lives(train, tmp_path):
    flags = ("--max_minutes", "0.05")
    with pytest.raises(Killed):
        train(tmp_path / "run", *flags, trainer_class=acting(5, die))
    state = tmp_path / "run/checkpoint-4/trainer_state.json"
    text = json.loads(state.read_text(encoding="utf-8"))
    text["stateful_callbacks"]["Watch"]["attributes"]["seconds"] = 2.99
    state.write_text(json.dumps(text), encoding="utf-8")
    manifest = checkpoints.read_manifest(state.parent)
    manifest["files"]["trainer_state.json"] = {"size": state.stat().st_size, "sha256": checkpoints._digest(state)}
    (state.parent / checkpoints.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    trainer = train(tmp_path / "run", *flags, "--resume_from_checkpoint")
    assert trainer.state.global_step == 5


# What is written last


def test_run_json_is_written_last(train, tmp_path):
    train(tmp_path / "run")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert max(times, key=times.get) == tmp_path / "run/run.json"


@pytest.mark.parametrize("broken", ["model", "run.json"])
def test_a_disk_that_is_full_at_the_end_leaves_nothing_half_written(broken, train, tmp_path):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=f"run/{broken} can't be written .the disk is full.*"
                                                              "checkpoint-9 is whole: go on from it"):
        if broken == "model":
            patch.setattr(GenerationConfig, "save_pretrained", full)
        else:
            patch.setattr(checkpoints.os, "replace", lambda source, target: full() if target.name == "run.json" else
                          os.rename(source, target))
        train(tmp_path / "run")
    names = contents(tmp_path / "run").keys()
    assert not {name for name in names if name.endswith(".tmp")} and "run.json" not in names
    assert broken == "run.json" or not {"adapter_model.safetensors", "report.html"} & names
    train(tmp_path / "run", "--resume_from_checkpoint")
    assert (tmp_path / "run/run.json").is_file() and not (tmp_path / "run" / checkpoints.STAGE).exists()


# Checkpoints without an optimizer


def test_a_signal_writes_a_checkpoint_to_go_on_from_even_with_save_only_model(train, tmp_path):
    flags = ("--save_only_model",)
    with pytest.raises(SystemExit):
        train(tmp_path / "run", *flags, trainer_class=acting(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert checkpoints.newest(tmp_path / "run")[0] == tmp_path / "run/checkpoint-5"
    with pytest.raises(Killed):  # checkpoint-6 and checkpoint-8 are of the model alone
        train(tmp_path / "run", *flags, "--resume_from_checkpoint", "--save_total_limit", "1", trainer_class=acting(8, die))
    newest, [sentence] = checkpoints.newest(tmp_path / "run")
    assert newest == tmp_path / "run/checkpoint-5" and "checkpoint-6 is passed over: it was written with --save_only_model" in sentence
    train(tmp_path / "run", *flags, "--resume_from_checkpoint")
    train(tmp_path / "through")
    assert same_end(tmp_path / "run", tmp_path / "through")


def test_a_run_with_checkpoints_of_the_model_alone_is_not_begun_anew(killed, train):
    folder = killed(5, "--save_only_model")
    before = contents(folder)
    with pytest.raises(UserError, match="written with --save_only_model, so they hold no optimizer"):
        train(folder, "--save_only_model", "--resume_from_checkpoint")
    with pytest.raises(UserError, match="checkpoint-4: it was written with --save_only_model"):
        train(folder, "--save_only_model", "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    assert contents(folder) == before


def test_a_rollback_without_an_optimizer_is_refused(train, tmp_path):
    with pytest.raises(UserError, match="--on_nan rollback .* --save_only_model keeps none"):
        train(tmp_path / "run", "--save_only_model", "--on_nan", "rollback")


# A new folder


def test_a_failure_before_the_first_checkpoint_names_the_one_that_the_run_came_from(killed, train, tmp_path, monkeypatch):
    named = killed(3) / "checkpoint-2"

    def full(*given, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=f"checkpoint-4 can't be written .* {named} is whole: go on .*--resume_from_checkpoint {named}$"):
        train(tmp_path / "on", "--resume_from_checkpoint", str(named),
              trainer_class=acting(3, lambda: monkeypatch.setattr(checkpoints, "put_in_place", full)))


# Changed settings take effect


def test_a_changed_learning_rate_takes_effect(killed, train, tmp_path):
    folder = killed(5)
    rates = {}
    for name, rate in (("run", "0.02"), ("same", "0.01")):
        trainer = train(tmp_path / f"{name}-on", "--resume_from_checkpoint", str(folder / "checkpoint-4"), "--learning_rate", rate,
                        "--weight_decay", "0.3", "--adam_beta1", "0.8", "--allow_changed", "learning_rate,weight_decay,adam_beta1")
        rates[name] = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line and line["step"] > 4]
        for group in trainer.optimizer.param_groups:
            assert group["betas"][0] == 0.8 and group["weight_decay"] in (0.3, 0.0)
        assert any(group["weight_decay"] == 0.3 for group in trainer.optimizer.param_groups)
    assert rates["run"] == pytest.approx([2 * rate for rate in rates["same"]]) and rates["same"][0] > 0


def test_another_optimizer_can_not_be_allowed(killed, train):
    folder = killed(3)
    with pytest.raises(UserError, match="state of another optimizer .optim was adamw.* now sgd.*leave --optim as it was"):
        train(folder, "--resume_from_checkpoint", "--optim", "sgd", "--allow_changed", "optim")


def test_changed_steps_between_checkpoints_take_effect(killed, train):
    folder = killed(3)
    train(folder, "--resume_from_checkpoint", "--save_steps", "3", "--allow_changed", "save_steps")
    assert {checkpoints.step_of(path) for path in folder.glob("checkpoint-*")} == {2, 3, 6, 9}


# Odd folders


def test_a_linked_checkpoint_is_gone_on_from_and_never_deleted_behind_the_link(killed, train, tmp_path):
    folder = killed(5)
    (folder / "checkpoint-4").rename(tmp_path / "elsewhere")
    (folder / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    (folder / "checkpoint-8").symlink_to(tmp_path / "gone")
    train(folder, "--resume_from_checkpoint", "--save_total_limit", "1")
    assert not (folder / "checkpoint-4").exists() and (tmp_path / "elsewhere/manifest.json").is_file()
    assert (folder / "checkpoint-8.set-aside-1").is_symlink() and checkpoints.fault(folder / "checkpoint-9") is None


@pytest.mark.parametrize("name", ["../x", "/etc/passwd"])
def test_a_manifest_that_names_a_file_outside_is_refused(name, killed, train):
    folder = killed(3)
    manifest = checkpoints.read_manifest(folder / "checkpoint-2")
    manifest["files"][name] = {"size": 1, "sha256": ""}
    (folder / "x").write_text("x", encoding="utf-8")
    (folder / "checkpoint-2/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=f"checkpoint-2: its manifest.json names {name}, which is outside of it"):
        train(folder, "--resume_from_checkpoint", str(folder / "checkpoint-2"))


def test_a_file_that_can_not_be_read_is_passed_over(killed, monkeypatch):
    folder, digest = killed(5), checkpoints._digest

    def bad(path):
        if path.parent.name == "checkpoint-4":
            raise OSError(5, "Input/output error")
        return digest(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_digest", bad)
        newest, [sentence] = checkpoints.newest(folder)
    assert newest == folder / "checkpoint-2" and "can't be read (Input/output error)" in sentence


@pytest.mark.parametrize(("change", "why"), [({"step": 4}, "it was written as checkpoint-4"), ({"asked": None}, "manifest.json is damaged"),
                                             ({"files": []}, "manifest.json is damaged")])
def test_a_manifest_that_does_not_fit_is_refused(change, why, killed, train):
    path = killed(3) / "checkpoint-2"
    (path / "manifest.json").write_text(json.dumps(checkpoints.read_manifest(path) | change), encoding="utf-8")
    with pytest.raises(UserError, match=f"checkpoint-2: .*{why}"):
        train(path.parent, "--resume_from_checkpoint", str(path))


def test_an_output_dir_that_is_a_link_to_nothing(train, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="run is a link to nothing: name a folder"):
        train(tmp_path / "run")


def test_a_parent_that_can_not_be_written(train, tmp_path):
    with pytest.raises(UserError, match="--output_dir /proc/run can't be written"):
        train("/proc/run")


def test_a_disk_that_is_full_at_the_start(train, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "_lock", full)
    with pytest.raises(UserError, match=r"--output_dir .*run can't be written \(No space left on device\): name another folder"):
        train(tmp_path / "run")


class BrokenFrom4(RecipeTrainer):
    """From step 4 on, the loss is no number."""

    until = 99

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if 4 <= self.state.global_step + 1 <= self.until else loss


class BrokenIn4(BrokenFrom4):
    until = 4


def test_a_rollback_goes_back_and_never_forward(train, tmp_path):
    """A later checkpoint comes into the folder while the run trains."""
    train(tmp_path / "other", "--max_steps", "8")
    folder = tmp_path / "run"

    class Later(BrokenIn4, acting(3, lambda: (tmp_path / "other/checkpoint-8").rename(folder / "checkpoint-8"))):
        pass

    trainer = train(folder, "--on_nan", "rollback", trainer_class=Later)
    [event] = [event["event"] for event in trainer.watch.events if "weights and optimizer" in event["event"]]
    assert f"those of {folder}/checkpoint-2 again" in event


def test_a_rollback_that_does_not_help_ends_the_run(train, tmp_path):
    with pytest.raises(UserError, match=f"step 5: the loss is nan .*after it the run went back to {tmp_path}/run/checkpoint-2"):
        train(tmp_path / "run", "--on_nan", "rollback", trainer_class=BrokenFrom4)


def test_a_rollback_in_a_new_folder_goes_back_to_where_the_run_came_from(killed, train, tmp_path):
    named = killed(3) / "checkpoint-2"
    trainer = train(tmp_path / "on", "--resume_from_checkpoint", str(named), "--on_nan", "rollback", trainer_class=BrokenIn4)
    assert any(f"those of {named} again" in event["event"] for event in trainer.watch.events)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize(("recipe", "flags"), [
    ("full", ("--max_tokens", "100")), ("adalora", ("--init_rank", "4", "--target_rank", "2", "--max_steps", "6")),
    ("prefix", ("--max_steps", "1")), ("adapter", ("--max_steps", "1", "--micro_batch_tokens", "64")),
    ("lora", ("--tokens_per_step", "200", "--num_train_epochs", "1")),
    ("full", ("--task", "pretrain", "--from_scratch", "--max_steps", "1")),
], ids=str)
def test_a_finished_run_of_any_kind_is_known_again(recipe, flags, tiny, data, tmp_path, capsys):
    run_recipe(recipe, tiny("gpt2"), data, tmp_path / "run", *flags)
    before = contents(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        run_recipe(recipe, tiny("gpt2"), data, tmp_path / "run", *flags, "--resume_from_checkpoint")
    assert end.value.code == 0 and "; nothing to do" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before
