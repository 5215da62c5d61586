"""The default job as a user starts it: the real `make` target, with the real bundled model and dialogues, only shorter."""

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from filelock import FileLock
from huggingface_hub import constants

from recipes.common import models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(what `make lora-gpt2` printed, run folder) without the Hub: the port refuses, the Hugging Face cache is empty."""
    if importlib.util.find_spec(models.BUNDLED["smollm2"].package) is None:
        pytest.skip(f"the bundled model is not installed: {models.BUNDLED['smollm2'].install}")
    folder = tmp_path_factory.getbasetemp() / "make"
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the job: some minutes of two cores
        folder = folder.parent.with_name("make")
    screen = folder / "screen"
    with FileLock(f"{folder}.lock"):
        if not screen.exists():
            folder.mkdir(exist_ok=True)
            screen.write_text(make_lora_gpt2(folder), encoding="utf-8")
    return screen.read_text(encoding="utf-8"), folder / "run"


def make_lora_gpt2(folder: Path) -> str:
    """What the job prints, run into folder / "run"."""
    converted = os.environ.get("RECIPES_CACHE", str(Path(constants.HF_HOME) / "recipes"))  # shared with real runs: made once
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hub"), "RECIPES_CACHE": converted}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        env.pop(name, None)
    # -o: whatever these tests run in is installed well enough, so nothing is installed anew.
    done = subprocess.run(["make", "-o", ".venv/.installed", "lora-gpt2", f"OUT={folder / 'run'}",
                           "ARGS=--max_steps 2 --max_train_samples 4 --max_eval_samples 2 --per_device_train_batch_size 1 "
                           "--gradient_accumulation_steps 2", "EVAL=--limit 2 --max_new_tokens 16"],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_substitute_can_not_be_missed(job):
    screen, run = job
    assert re.search(r"^!{20,}\n! .*Hub can't be reached.* gpt2 .* !\n! .*uses smollm2 instead.* !\n!{20,}$", screen, re.M)
    assert "model: smollm2 (asked for: gpt2)" in screen
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (record["model"]["requested"], record["model"]["used"]) == ("gpt2", "smollm2")


def test_it_trains_what_it_says(job):
    screen, run = job
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["steps"] == 2 and record["data"]["splits"]["train"]["rows"] == 4 and record["data"]["splits"]["dev"]["rows"] == 2
    # rank 8 on q, k, v, o, gate, up and down of 30 blocks: 8 x (inputs + outputs) each, at width 576, 192 (k, v) and 1,536.
    block = 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert record["trainable_parameters"] == 30 * block
    assert "train: 4 of 4 dialogues" in screen and "dev loss" in screen
    assert record["peak_memory_mb"] < 4000
    assert {path.name for path in run.iterdir()} >= {"run.json", "report.html", "adapter_model.safetensors", "tokenizer.json"}


def test_it_ends_with_a_table_samples_and_what_to_do_next(job):
    screen, run = job
    table = screen[screen.index("2 dialogues from data/customer_service/test.jsonl"):]
    assert "BLEU" in table and "ROUGE-L" in table and "loss" in table
    rows = [line.split() for line in table.splitlines() if re.search(r"(?:\d+\.\d\d +){8}\d", line)]
    evaluation = json.loads((run / "run.json").read_text(encoding="utf-8"))["evaluation"]["test"]
    assert len(rows) == len(evaluation["table"]) and {row["model"] for row in evaluation["table"]} == {"smollm2 (untuned)", "lora"}
    assert evaluation["table"][-1]["language"] == "all"
    losses = {row["model"]: row["values"][0] for row in evaluation["table"] if row["language"] == "all"}
    assert all(1 < loss < 8 for loss in losses.values()) and len(set(losses.values())) == 2
    assert len(evaluation["samples"]) == min(20, evaluation["table"][-1]["count"])
    for said in ("reference | ", "smollm2 (untuned) | ", "lora | ", "next:", f"scripts/chat.py --run {run}", "tensorboard"):
        assert said in table
    assert all(text.strip() for sample in evaluation["samples"] for _, text in sample)  # a real model says something
    assert len((run / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()) == evaluation["table"][-1]["count"]


def test_a_second_run_does_not_overwrite_it(job):
    _, run = job
    before = (run / "run.json").read_bytes()
    done = subprocess.run(["make", "-o", ".venv/.installed", "lora-smollm2", f"OUT={run}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "holds another run" in done.stderr and "Traceback" not in done.stderr
    assert (run / "run.json").read_bytes() == before
