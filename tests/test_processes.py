"""Several processes: two of them, over gloo on a CPU, do what one does; only the first prints, and an error is shown once."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import DIALOGUES, ROOT
from safetensors.torch import load_file
from test_cli import shell
from test_methods import run_recipe

from recipes.common import processes
from recipes.common.errors import UserError
from recipes.common.trainer import RecipeTrainer

RECIPES = ("full", "lora", "prefix", "adapter", "adalora")
FLAGS = ("--num_train_epochs", "2", "--logging_steps", "1", "--save_strategy", "epoch", "--eval_strategy", "epoch",
         "--load_best_model_at_end", "True", "--learning_rate", "0.003")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, rows in (("train", DIALOGUES * 3), ("dev", DIALOGUES[:3]), ("test", DIALOGUES[1:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one(tiny, data, tmp_path_factory):
    """The folder of the runs of one process, each recipe's under its name, "lora" with its scores; steps of 4 rows."""
    folder = tmp_path_factory.mktemp("one")
    for recipe in RECIPES:
        run_recipe(recipe, tiny("llama"), data, folder / recipe, *FLAGS, "--per_device_train_batch_size", "4")
    return folder


@pytest.fixture(scope="module")
def two(one, tiny, data, tmp_path_factory):
    """(folder of the runs of two processes, 2 rows of each step in each; what was printed; exit status)."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(one / "lora", folder / "scored" / "lora")
    job = {"model": str(tiny("llama")), "data": str(data), "folder": str(folder), "recipes": RECIPES,
           "scored": [str(folder / "scored" / "lora"), str(one / "adapter")], "flags": [*FLAGS, "--per_device_train_batch_size", "2"]}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "tests/two_processes.py",
         json.dumps(job)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    return folder, done.stdout, done.returncode


def difference(run: Path, other: Path) -> float:
    """The largest difference between the losses, norms of the gradient and weights of two runs."""
    logs = [[line.get(key) for line in json.loads((path / "run.json").read_text(encoding="utf-8"))["history"]
             for key in ("loss", "grad_norm", "eval_loss") if key in line] for path in (run, other)]
    [weights] = [name for name in ("model.safetensors", "trained_parameters.safetensors") if (run / name).is_file()]
    states = [load_file(path / weights) for path in (run, other)]
    return max([abs(a - b) for a, b in zip(*logs, strict=True)]
               + [float((states[0][name] - states[1][name]).abs().max()) for name in states[0]])


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_train_as_one_does(recipe, one, two):
    assert difference(one / recipe, two[0] / recipe) < 1e-4
    assert difference(one / "lora", one / "lora") == 0


def test_another_batch_is_another_trajectory(one, tiny, data, tmp_path):
    run_recipe("lora", tiny("llama"), data, tmp_path / "run", *FLAGS, "--per_device_train_batch_size", "4", "--seed", "43")
    assert difference(one / "lora", tmp_path / "run") > 1e-3


def test_a_signal_to_one_process_ends_both_and_they_go_on(two):
    folder = two[0]
    assert [(folder / f"status-{rank}").read_text() for rank in (0, 1)] == ["75", "75"]
    events = json.loads((folder / "stopped" / "run.json").read_text(encoding="utf-8"))["events"]
    assert [event["event"] for event in events] == [f"resumed from {folder}/stopped/checkpoint-3"]
    assert difference(folder / "lora", folder / "stopped") == 0


class BrokenAlone(RecipeTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss


@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
def test_a_loss_that_is_no_number_in_one_process_is_met_by_both_as_by_one(on_nan, two, tiny, data, tmp_path):
    folder, printed, _ = two
    [event] = json.loads((folder / on_nan / "run.json").read_text(encoding="utf-8"))["events"]
    assert event["event"].startswith("step 4: the loss is nan on train row") and " of rank 1; " in event["event"]
    assert printed.count(f"note: {event['event']}") == 1
    run_recipe("lora", tiny("llama"), data, tmp_path / "run", *FLAGS, "--per_device_train_batch_size", "4", "--on_nan", on_nan,
               trainer_class=BrokenAlone)
    assert apart(tmp_path / "run", folder / on_nan) < 1e-4 < apart(folder / "lora", folder / on_nan)


def apart(run: Path, other: Path) -> float:
    states = [load_file(path / "trained_parameters.safetensors") for path in (run, other)]
    return max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])


def test_a_loss_that_is_no_number_in_one_process_stops_both_with_its_rows(two):
    folder, told = two[0], [(two[0] / f"stop-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and re.match(r"step 4: the loss is nan on train rows? .* of rank 1; look at these rows", told[0])
    assert f"{folder}/stop/checkpoint-3 is the last whole checkpoint" in told[0] and not (folder / "stop/run.json").exists()


def test_a_loss_that_leaps_in_one_process_is_told_once_and_alike(two):
    folder, printed, _ = two
    (events, losses), other = (json.loads((folder / f"leap-{rank}").read_text()) for rank in (0, 1))
    assert [events, losses] == other and len(losses) == 6
    [event] = events
    assert re.match(r"step 4: the loss leapt to \d{3}\.\d+, from .* of rank 1$", event["event"]) and printed.count(event["event"]) == 1


def test_only_the_first_process_prints_and_an_error_is_shown_once(two):
    folder, printed, status = two
    assert status == 1, printed
    assert len(re.findall(r"train: 12 of 12 dialogues", printed)) == len(RECIPES) + 7
    assert "missing keys" not in printed
    assert printed.count("stopped after step 3 of 6") == 1
    # A slow machine draws the full bar twice; the shares of two ranks would be two totals.
    assert len(set(re.findall(r"Replies of lora: 100%\|[^|]*\| (\d+/\d+)", printed))) == 1
    assert printed.count(f"error: --data {folder}/nothing: no such file or folder") == 1, printed
    assert "Traceback" not in printed[: printed.index("error: --data")]


def test_evaluation_is_divided_and_merged(one, two, monkeypatch):
    """Of two runs, each alone and both together."""
    runs = ["--run", str(one / "lora"), "--run", str(one / "adapter")]
    monkeypatch.setattr(sys, "argv", ["scripts/evaluate.py", *runs, "--dtype", "float32", "--max_new_tokens", "8"])
    runpy.run_path(str(ROOT / "scripts/evaluate.py"))["main"]()
    alone, together, label = one / "lora", two[0] / "scored" / "lora", "test+adapter"
    lines = (together / f"predictions-{label}.jsonl").read_text(encoding="utf-8")
    assert lines == (alone / f"predictions-{label}.jsonl").read_text(encoding="utf-8") and len(lines.splitlines()) == 5
    losses = [json.loads((run / f"losses-{label}.json").read_text(encoding="utf-8")) for run in (alone, together)]
    assert losses[0].keys() == losses[1].keys() == {"lora", "adapter", "ensemble"}
    for own, other in zip(*map(dict.values, losses), strict=True):
        assert own.keys() == other.keys() == {"0", "1", "2"}
        assert all(own[row] == pytest.approx(other[row], abs=1e-4) for row in own)
    tables = [json.loads((run / "run.json").read_text(encoding="utf-8"))["evaluation"][label]["table"] for run in (alone, together)]
    for row, other in zip(*tables, strict=True):
        assert row["values"] == pytest.approx(other["values"], abs=1e-4) and row["count"] == other["count"]


def test_latency_is_no_matter_for_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["scripts/evaluate.py", "--run", "runs/none", "--latency", "4"])
    with pytest.raises(UserError, match="--latency 4 needs the machine for itself"):
        runpy.run_path(str(ROOT / "scripts/evaluate.py"))["main"]()


EXCHANGE = """
import atexit
import sys
from pathlib import Path
import torch
import torch._dynamo  # when imported after the group is formed, it would hold on to it
from recipes.common import errors

@atexit.register  # so it comes after what errors.install registers
def show():
    print(sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm")), "threads of gloo")

errors.install()
torch.distributed.init_process_group("gloo")

def train(end):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    model(torch.ones(1, 8)).sum().backward()
    model.circle = [model]
    for _ in range(20):
        torch.distributed.all_reduce(torch.ones(1000))
    if end == "in an error":
        errors.install()  # as a script and its recipe both do
        raise RuntimeError("error: " + end)  # a bug of ours, whose traceback must not be swallowed

train(sys.argv[1])
"""


@pytest.mark.parametrize(("end", "code"), [("well", 0), ("in an error", 1)])
def test_a_process_that_has_just_exchanged_ends_well(end, code, tmp_path):
    """Without `part_at_exit`, nearly every such group aborts: gloo still holds the last tensors when the interpreter ends."""
    (tmp_path / "exchange.py").write_text(EXCHANGE, encoding="utf-8")
    result = shell(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "exchange.py", end,
                   OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    assert result.code == code and result.err.count(f"RuntimeError: error: {end}") == code and "terminate" not in result.err, result.err
    assert result.out.split("\n")[0] == "0 threads of gloo", result.out


def test_a_tied_weight_is_not_missed_and_another_is(tiny, data, tmp_path, monkeypatch):
    trainer, told = run_recipe("full", tiny("llama"), data, tmp_path / "run", "--max_steps", "1"), []
    monkeypatch.setattr("transformers.trainer.logger.warning", told.append)
    for missing in (["lm_head.weight"], ["lm_head.weight", "model.norm.weight"]):
        trainer._issue_warnings_after_load(SimpleNamespace(missing_keys=missing, unexpected_keys=[]))
    assert told == ["There were missing keys in the checkpoint model loaded: ['model.norm.weight']."]


def test_repeated_rows_are_told(two):
    # 12 rows fill three steps of 4; see the events of a run whose batches of 10 they don't fill
    events = json.loads((two[0] / "uneven" / "run.json").read_text(encoding="utf-8"))["events"]
    assert "each epoch ends with 8 rows that it began w" in [event["event"][:43] for event in events]
    assert "events" not in json.loads((two[0] / "lora" / "run.json").read_text(encoding="utf-8"))


def whole(shares: list[range], items: int) -> bool:
    return [i for share in shares for i in share] == list(range(items))


@pytest.mark.parametrize("items", [0, 1, 5, 6])
def test_shares_hold_every_item_once(items, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(processes.share(items))
    assert whole(shares, items) and max(map(len, shares)) - min(map(len, shares)) <= 1
    assert not whole([*shares[:2], range(items + 1)], items)
