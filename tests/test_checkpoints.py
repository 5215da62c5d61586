"""Runs that can't be lost: manifests, what is passed over and why, kills at any moment, signals, full disks, repeated runs."""

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import resource
import signal
from dataclasses import asdict

import pytest
import torch
from conftest import DIALOGUES, ROOT
from safetensors.torch import load_file, save_file
from test_cli import call, refused
from test_methods import run_recipe
from transformers import TrainerCallback

from recipes.common import args, checkpoints
from recipes.common.errors import UserError
from recipes.common.trainer import RecipeTrainer

# 5 rows in steps of 2: three steps an epoch, three epochs.
STEPS = ("--num_train_epochs", "3", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--logging_steps", "2",
         "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "epoch", "--load_best_model_at_end", "False",
         "--dropout", "0.1", "--learning_rate", "0.01")


def spec_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, own in (("train", (DIALOGUES * 2)[:5]), ("dev", DIALOGUES[:2])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def through(tiny, data, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("through") / "run"
    run_recipe("lora", tiny("gpt2"), data, folder, *STEPS, "--save_total_limit", "9")
    return folder


def same_end(one, other) -> bool:
    """Whether two run folders hold the same weights, and the same log but for times."""
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    logs = [[{key: line[key] for key in ("step", "loss", "eval_loss", "grad_norm") if key in line}
             for line in json.loads((folder / "run.json").read_text(encoding="utf-8"))["history"]] for folder in (one, other)]
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) and logs[0] == logs[1]


# The manifest


@pytest.fixture
def make(tmp_path):
    """make(4) -> a whole checkpoint-4 of the run folder `tmp_path / "run"`, of two small files."""
    def make(step, asked=None, place=True):
        folder = tmp_path / "run"
        staged = folder / checkpoints.STAGE / f"checkpoint-{step}"
        staged.mkdir(parents=True)
        save_file({"weight": torch.full((4,), float(step))}, staged / "model.safetensors")
        (staged / "optimizer.pt").write_bytes(b"state of the optimizer")
        return checkpoints.put_in_place(staged, folder, asked or {}) if place else staged
    return make


def test_a_manifest_lists_every_file(make):
    folder = make(4)
    manifest = checkpoints.read_manifest(folder)
    assert manifest["step"] == 4 and manifest["files"].keys() == {"model.safetensors", "optimizer.pt"}
    content = b"state of the optimizer"
    assert manifest["files"]["optimizer.pt"] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert checkpoints.fault(folder) is None and not (folder.parent / checkpoints.STAGE).exists()


def truncate(folder):
    (folder / "optimizer.pt").write_bytes(b"state")


def tamper(folder):
    (folder / "optimizer.pt").write_bytes(b"STATE of the optimizer")


def empty_manifest(folder):
    (folder / "manifest.json").write_text("[]", encoding="utf-8")


def cut_manifest(folder):
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:50])


@pytest.mark.parametrize(("damage", "why"), [
    (truncate, "optimizer.pt has 5 bytes where 22 were written"), (tamper, "optimizer.pt was changed since it was written"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin was put there later"),
    (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"), (empty_manifest, "manifest.json is damaged"),
    (cut_manifest, "manifest.json is damaged"),
])
def test_a_damaged_checkpoint_is_passed_over_and_why_is_said(damage, why, make):
    good, bad = make(2), make(4)
    assert checkpoints.newest(good.parent) == (bad, [])
    damage(bad)
    newest, [sentence] = checkpoints.newest(good.parent)
    assert newest == good and str(bad) in sentence and why in sentence


def test_what_a_kill_leaves_is_finished_or_removed(make):
    done, half = make(2), make(4, place=False)
    assert checkpoints.tidy(done.parent) == [f"{half} is removed: its writing was interrupted"]
    assert checkpoints.newest(done.parent)[0] == done and not half.exists()
    moved = make(6)
    os.makedirs(done.parent / checkpoints.STAGE)
    os.rename(moved, done.parent / checkpoints.STAGE / moved.name)  # killed between the manifest and the last rename
    [note] = checkpoints.tidy(done.parent)
    assert str(moved) in note and checkpoints.newest(done.parent) == (moved, [])


def test_the_last_and_the_best_checkpoint_are_never_deleted(make):
    paths = [make(step) for step in (2, 4, 6, 8)]
    checkpoints.rotate(paths[0].parent, 3, str(paths[0]))
    assert [path.exists() for path in paths] == [True, False, True, True]
    truncate(paths[3])  # the newest is damaged: the last whole one is another
    checkpoints.rotate(paths[0].parent, 1, str(paths[0]))
    assert [path.exists() for path in paths] == [True, False, True, True]
    checkpoints.rotate(paths[0].parent, 1, None)
    assert [path.exists() for path in paths] == [False, False, True, True]


def test_a_changed_argument_is_refused_unless_it_is_allowed(make):
    before = {"rank": 8, "rows": {"train": {"sha256": "a"}}}
    folder, now = make(2, before), {"rank": 16, "rows": {"train": {"sha256": "b"}}}
    assert checkpoints.check_unchanged(folder, before, None) == {}
    for allowed, named in ((None, "rank was 8, now 16, and 1 more"), ("rank", "the train data are others")):
        with pytest.raises(UserError, match=f"{named}.*--allow_changed rank,rows"):
            checkpoints.check_unchanged(folder, now, allowed)
    assert checkpoints.check_unchanged(folder, now, "rows,rank") == {"rank": "rank was 8, now 16", "rows": "the train data are others"}
    with pytest.raises(UserError, match="--allow_changed rnak: no argument"):
        checkpoints.check_unchanged(folder, now, "rnak")


def test_a_checkpoint_without_optimizer_is_no_place_to_go_on_from(make):
    first, second = make(2), make(4, place=False)
    (second / "optimizer.pt").unlink()
    second = checkpoints.put_in_place(second, first.parent, {})
    newest, [sentence] = checkpoints.newest(first.parent)
    assert newest == first and "checkpoint-4 is passed over: it was written with --save_only_model" in sentence
    make(6)
    checkpoints.rotate(first.parent, 1, None)
    assert checkpoints.found_in(first.parent) == [first.parent / "checkpoint-6"]


def test_the_last_checkpoint_with_an_optimizer_is_never_deleted(make):
    first = make(2)
    for step in (4, 6):
        staged = make(step, place=False)
        (staged / "optimizer.pt").unlink()
        checkpoints.put_in_place(staged, first.parent, {})
    checkpoints.rotate(first.parent, 1, None)
    assert checkpoints.found_in(first.parent) == [first.parent / "checkpoint-6", first]


# Whole runs


class At(TrainerCallback):
    """Calls `act` at the end of step `step`."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def acting(step, act):
    """A RecipeTrainer that calls `act` at the end of step `step`."""
    class Acting(RecipeTrainer):
        def __init__(self, *, callbacks, **kwargs):
            super().__init__(callbacks=[*callbacks, At(step, act)], **kwargs)
    return Acting


def test_other_data_are_refused_on_resume(through, tiny, data, write_jsonl, tmp_path):
    for split in ("train", "dev"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        other = write_jsonl(rows[::-1] if split == "train" else rows, f"other/{split}.jsonl").parent
    checkpoint = ("--resume_from_checkpoint", str(through / "checkpoint-6"))
    with pytest.raises(UserError, match="the train data are others.*--allow_changed rows"):
        run_recipe("lora", tiny("gpt2"), other, tmp_path / "run", *STEPS, *checkpoint)
    trainer = run_recipe("lora", tiny("gpt2"), other, tmp_path / "run", *STEPS, *checkpoint, "--allow_changed", "rows")
    [event] = trainer.watch.events
    assert event["event"].endswith("checkpoint-6; the train data are others")
    assert json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["events"] == [event]


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 5), (signal.SIGINT, 6)])  # within an epoch, and in the last step of one
def test_a_signal_ends_the_run_with_a_checkpoint(number, step, through, tiny, data, tmp_path, capfd):
    before, folder = signal.getsignal(number), tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        run_recipe("lora", tiny("gpt2"), data, folder, *STEPS, trainer_class=acting(step, lambda: os.kill(os.getpid(), number)))
    assert end.value.code == 75
    said = capfd.readouterr()
    written = folder / f"checkpoint-{step}"
    assert f"{number.name}: finishing the step" in said.err and f"{written} is written" in said.out
    assert signal.getsignal(number) is before and checkpoints.fault(written) is None
    run_recipe("lora", tiny("gpt2"), data, folder, *STEPS, "--resume_from_checkpoint")
    assert same_end(folder, through)


def test_a_second_signal_ends_at_once_without_harm(through, tiny, data, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    if not (pid := os.fork()):
        with contextlib.suppress(BaseException):
            run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, trainer_class=acting(3, twice))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert checkpoints.newest(tmp_path / "run") == (tmp_path / "run/checkpoint-2", [])
    run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--resume_from_checkpoint")
    assert same_end(tmp_path / "run", through)


def test_a_run_that_reached_its_last_step_takes_no_further_one(tiny, data, tmp_path):
    """Killed after its last checkpoint, within an epoch: the Trainer alone would take a step too many."""
    flags = (*STEPS, "--max_steps", "4")
    run_recipe("lora", tiny("gpt2"), data, tmp_path / "through", *flags)
    run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *flags)
    (tmp_path / "run/run.json").unlink()
    trainer = run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *flags, "--resume_from_checkpoint")
    assert trainer.state.global_step == 4 and same_end(tmp_path / "run", tmp_path / "through")


def test_early_stopping_counts_on_after_a_resume(tiny, data, tmp_path):
    """Each evaluation is worse than the first: with a patience of 2, the third is the last."""
    flags = (*STEPS, "--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "True", "--early_stopping_patience", "2")

    class Worse(RecipeTrainer):
        def _metrics(self, prediction):
            return super()._metrics(prediction) | {"loss": 1.0 + self.state.global_step}

    class Killed(Exception):
        pass

    def die():
        raise Killed

    class WorseAndKilled(Worse, acting(5, die)):
        pass

    with pytest.raises(Killed):
        run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *flags, trainer_class=WorseAndKilled)
    trainer = run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *flags, "--resume_from_checkpoint", trainer_class=Worse)
    assert trainer.state.global_step == 6 and trainer.state.best_global_step == 2
    told = ("--early_stopping_patience 2: stopped after 6 of 9 steps, as no better dev loss came in 2 evaluations; the best was that of "
            "step 2")
    events = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["events"]
    assert [event["event"] for event in events if event["step"] == 6] == [told]
    (tmp_path / "run/run.json").unlink()  # killed once more, after training had stopped
    trainer = run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *flags, "--resume_from_checkpoint", trainer_class=Worse)
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(file, through, tiny, data, tmp_path):
    """After step 3 files may only grow to a little less than the size of this one: the system refuses the rest, as a full disk would."""
    limit = (through / "checkpoint-2" / file).stat().st_size - 100
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match="checkpoint-4 can't be written .the disk is full.*checkpoint-2 is whole: go on"):
            run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS,
                       trainer_class=acting(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [checkpoints.LIVES, "checkpoint-2"]
    run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--resume_from_checkpoint")
    assert same_end(tmp_path / "run", through)


def test_a_folder_that_became_read_only_is_told(tiny, data, tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError(13, "Permission denied")

    with pytest.raises(UserError, match="checkpoint-4 can't be written .Permission denied.*checkpoint-2 is whole"):
        run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS,
                   trainer_class=acting(3, lambda: monkeypatch.setattr(checkpoints.os, "rename", refuse)))


@pytest.fixture(scope="module")
def chaos():
    return spec_of(ROOT / "benchmarks/chaos.py")


def test_twenty_kills_change_nothing(chaos, tmp_path):
    chaos.prepare(tmp_path)
    tally = chaos.chaos(tmp_path, "lora", 20, "calls", random.Random(1))
    assert tally["kills"] == 20 and tally["half-written"] >= 5
    assert tally["runs"] >= 5 and tally["different"] == tally["failed"] == 0


def test_a_resume_that_forgets_something_is_noticed(chaos, tmp_path, monkeypatch):
    chaos.prepare(tmp_path)
    monkeypatch.setattr(RecipeTrainer, "_load_rng_state", lambda self, checkpoint: None)
    assert chaos.chaos(tmp_path, "lora", 1, "calls", random.Random(3))["different"] == 1


# Repeating a run from its run.json


def test_run_json_gives_the_run_back(through, data, tmp_path):
    other = tmp_path / "other"
    result = call("scripts/train.py", "--config", through / "run.json", "--output_dir", tmp_path / "again")
    assert result.code == 0, result.err
    assert same_end(tmp_path / "again", through)
    first, again = (json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (through, tmp_path / "again"))
    for name in ("method_arguments", "shared_arguments", "training_arguments"):
        different = {key for key in first[name] if first[name][key] != again[name][key]}
        assert different <= {"output_dir", "repeats"}
    # Further flags change what is asked, and the rest stays.
    result = call("scripts/train.py", "--config", tmp_path / "again/run.json", "--output_dir", other, "--seed", "7", "--max_steps", "2")
    assert result.code == 0, result.err
    record = json.loads((other / "run.json").read_text(encoding="utf-8"))
    assert record["training_arguments"]["seed"] == 7 and record["steps"] == 2
    assert record["training_arguments"]["learning_rate"] == 0.01 and not record.get("events")


@pytest.mark.parametrize(("recipe", "flags"), [
    ("lora", "--rank 4 --warmup_steps 0 --seed 3 --optim adafactor --report_to none"),
    ("prefix", "--prefix_projection --eval_strategy steps --eval_steps 7 --save_strategy steps --save_steps 7 "
               "--load_best_model_at_end True --early_stopping_patience 2"),
    ("full", "--task classify --label topic --oos_label other --data a.csv:0.7 b.csv:0.3 --columns text=q --model minilm "
             "--save_strategy no --eval_strategy no --weight_decay 0.1"),
    ("adalora", "--num_train_epochs 5 --logging_steps 1 --bf16 False --gradient_accumulation_steps 3 "
                "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {\"min_lr\":1e-5}"),
    ("adapter", "--task translate --instruction Translate: --max_steps 9 --learning_rate 0.5 --no_load_best_model_at_end"),
])
def test_the_flags_of_a_record_parse_to_the_same_arguments(recipe, flags):
    module = importlib.import_module(f"recipes.{recipe}")

    def arguments(words):
        shared, method, training = args.parse(module.__doc__, module.MethodArguments, [*words, "--output_dir", "out"])
        return json.loads(json.dumps({"shared_arguments": asdict(shared), "method_arguments": asdict(method),
                                      "training_arguments": training.to_dict()}, default=str))

    asked = arguments(flags.split(" "))
    record = asked | {"model": {"used": asked["shared_arguments"]["model"], "requested": asked["shared_arguments"]["model"]}}
    assert arguments(args.of_record(record, module.MethodArguments)) == asked
    record["model"]["used"] = "smollm2-from-the-shelf"  # what a fallback put in its place
    assert arguments(args.of_record(record, module.MethodArguments))["shared_arguments"]["model"] == "smollm2-from-the-shelf"


def test_changed_data_are_said_when_a_run_is_repeated(through, tmp_path):
    record = json.loads((through / "run.json").read_text(encoding="utf-8"))
    record["data"]["splits"]["train"]["sha256"] = "0" * 64
    (tmp_path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    result = call("scripts/train.py", "--config", tmp_path / "run.json", "--output_dir", tmp_path / "run", "--max_steps", "1")
    assert result.code == 0 and f"the train data are not those of {tmp_path / 'run.json'}" in result.out


def test_a_repeat_by_another_number_of_processes_is_refused_unless_allowed(through, tmp_path):
    record = json.loads((through / "run.json").read_text(encoding="utf-8"))
    assert record["world_size"] == 1
    (tmp_path / "run.json").write_text(json.dumps(record | {"world_size": 2}), encoding="utf-8")
    words = ("scripts/train.py", "--config", tmp_path / "run.json", "--output_dir", tmp_path / "run", "--max_steps", "1")
    refused(call(*words), "that run had 2 processes, and here 1 is", "a step would have 2 rows in place of 4", "start 2, or allow it",
            untouched=tmp_path / "run")
    refused(call(*words, "--per_device_train_batch_size", "2"), "its steps have as many rows")
    result = call(*words, "--allow_changed", "world_size", "--gradient_accumulation_steps", "4")
    assert result.code == 0, result.err
    [event, *_] = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["events"]
    assert event["event"] == f"{tmp_path}/run.json is of 2 processes, and this run is of 1: another order of rows, and other sums"


@pytest.mark.parametrize(("text", "why"), [(None, "No such file"), ("{}", "is no run.json"), ("[1]", "is no run.json"),
                                           ("?", "is no run.json")])
def test_a_config_that_is_no_run_json_is_refused(text, why, tmp_path):
    if text:
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
    result = call("scripts/train.py", "--config", tmp_path / "run.json")
    assert result.code == 1 and why in result.err and "Traceback" not in result.err


def test_full_determinism_gives_equal_weights(tiny, data, tmp_path):
    kept = {name: os.environ.get(name) for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING",
                                                    "HCCL_DETERMINISTIC", "FLASH_ATTENTION_DETERMINISTIC")}
    try:
        for name, seed in (("one", "42"), ("two", "42"), ("other", "43")):
            run_recipe("lora", tiny("gpt2"), data, tmp_path / name, *STEPS, "--max_steps", "3", "--full_determinism", "--seed", seed)
    finally:
        torch.use_deterministic_algorithms(False)
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    assert same_end(tmp_path / "one", tmp_path / "two") and not same_end(tmp_path / "one", tmp_path / "other")
