"""scripts/compare.py on tiny models: what is trained and scored, what is reused, what is chosen on dev, what is refused, what is advised.

The real scripts run, but in this process, which costs a second where a process of its own costs ten; the last test starts real ones.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_cli
from conftest import DIALOGUES, ROOT
from test_cli import refused

from recipes.common import args, comparison, comparison_record, comparison_runs, item_scores, statistics
from recipes.common import search as search_module
from recipes.common.errors import UserError

spec = importlib.util.spec_from_file_location("compare", ROOT / "scripts/compare.py")
compare = sys.modules["compare"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)

SHORT = ["--max_length", "128", "--use_cpu", "--no_bf16", "--report_to", "none", "--logging_steps", "1", "--max_new_tokens", "4",
         "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
BROKEN = "raise UserError('there is no such thing')"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A data folder: 12 train, 4 dev and 6 test dialogues in two languages."""
    folder = tmp_path_factory.mktemp("shop")
    for split, rows in (("train", DIALOGUES * 3), ("dev", DIALOGUES), ("test", [*DIALOGUES, *DIALOGUES[:2]])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A copy of LoRA's recipe whose training fails."""
    path = tmp_path_factory.mktemp("copies") / "broken.py"
    text = (ROOT / "recipes/lora.py").read_text(encoding="utf-8")
    path.write_text(text.replace("    targets = method", f"    {BROKEN}\n    targets = method"), encoding="utf-8")
    return path


class Calls(list):
    """The commands that were started, each in this process; `comparison_runs.call` of the tests."""

    def __call__(self, command, log):
        self.append(shlex.join(command))
        script = [ROOT / "recipes/common/search.py", *command[3:]] if command[1] == "-m" else command[1:]
        result = test_cli.call(*script)
        log.write_text(result.out + test_cli.without_bars(result.err), encoding="utf-8")
        return result.code


@pytest.fixture(scope="module")
def go(shop, tiny):
    """go(OUT, words...) -> (exit status, what was printed, the commands that were started)."""
    def run(out, *words, short=SHORT):
        calls = Calls()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comparison_runs, "call", calls)
            patch.setattr(comparison_record, "RESAMPLES", 200)
            patch.setattr(comparison_runs, "TIMED", 1)
            patch.setattr(sys, "argv", ["scripts/compare.py", "--model", str(tiny("llama")), "--data", str(shop), "--output_dir", str(out),
                                        *short, *map(str, words)])
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                status = compare.main()
        return status, printed.getvalue(), calls

    return run


FIRST = ["--recipes", "full", "lora"]


@pytest.fixture(scope="module")
def compared(go, broken, tmp_path_factory):
    """(folder, exit status, what was printed, record) of a comparison of two recipes and one that fails, with two seeds."""
    out = tmp_path_factory.mktemp("compared") / "out"
    status, printed, _ = go(out, *FIRST, broken, "--seeds", "2", "--budget", "steps:3", "--grid", "full.learning_rate=0.02")
    return out, status, printed, json.loads((out / "compare.json").read_text(encoding="utf-8"))


def test_all_are_trained_alike_and_scored_on_the_same_rows(compared, shop):
    out, status, printed, record = compared
    assert status == 0
    assert {path.name for path in out.iterdir()} >= {"full-learning_rate=0.02-seed42", "full-learning_rate=0.02-seed43", "lora-seed42",
                                                     "lora-seed43", "logs", "compare.json", "compare.md"}
    for folder in out.glob("*-seed*"):
        if folder.name.startswith("broken"):
            continue
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert run["steps"] == 3 and run["training_arguments"]["seed"] == int(folder.name[-2:])
        assert run["training_arguments"]["learning_rate"] == (0.02 if folder.name.startswith("full") else 2e-3)
        assert run["evaluation"]["test"]["rows"] == 6
    assert [(s["name"], s["status"], s["base"]) for s in record["systems"]] == [
        ("full", "done", False), ("lora", "done", False), ("broken", "failed", False), ("untuned", "done", True)]
    assert record["items"] == 6 and record["unit"] == "dialogues" and record["seeds"] == [42, 43] and record["split"] == "test"
    assert record["source"] == str(shop / "test.jsonl")


def test_the_scores_are_those_of_the_runs(compared):
    out, _, _, record = compared
    full, lora, _, untuned = record["systems"]
    for system, model in ((full, "full"), (lora, "lora"), (untuned, None)):
        tables = [json.loads((out / run["name"] / "run.json").read_text(encoding="utf-8"))["evaluation"]["test"]
                  for run in (system["runs"] or full["runs"][:1])]
        for metric, column in (("loss", "loss"), ("bleu", "BLEU"), ("chrf", "chrF"), ("rougeL", "ROUGE-L")):
            values = [float(next(row for row in table["table"] if row["language"] == "all" and (
                row["model"] == model or model is None and "untuned" in row["model"]))["values"][table["columns"].index(column)])
                for table in tables]
            assert system["scores"][metric]["seeds"] == pytest.approx(values, rel=1e-6)
            assert system["scores"][metric]["mean"] == pytest.approx(np.mean(values))
            assert system["scores"][metric]["low"] <= system["scores"][metric]["high"]
    assert full["scores"]["loss"]["deviation"] > 0 and untuned["scores"]["loss"]["deviation"] is None
    assert record["best"]["loss"] == "full"  # the rate of 0.02 on all weights learns most in three steps
    assert untuned["scores"]["loss"]["against_best"]["difference"] > 0 and full["scores"]["loss"]["against_best"] is None
    assert full["scores"]["loss"]["against_base"]["difference"] == -untuned["scores"]["loss"]["against_best"]["difference"]


def test_what_each_costs(compared):
    out, _, _, record = compared
    full, lora, broken, untuned = (system["costs"] for system in record["systems"])
    assert full["trainable_parameters"] == full["total_parameters"] > lora["trainable_parameters"] > 0
    weights = (out / "lora-seed42/adapter_model.safetensors").stat().st_size
    assert 0 < lora["disk_mb"] - weights / 1e6 < 0.01 and full["disk_mb"] > lora["disk_mb"]
    assert broken == {} and untuned["disk_mb"] == 0
    assert all(costs["latency"] > 0 for costs in (full, lora, untuned)) and full["peak_memory_mb"] > 100


def test_a_failure_is_shown_and_stops_no_other(compared):
    out, _, printed, record = compared
    run = record["systems"][2]["runs"][0]
    assert run["status"] == "failed" and run["error"] == "there is no such thing"
    assert "broken-seed42: FAILED" in printed and "there is no such thing" in (out / "logs/broken-seed42.log").read_text(encoding="utf-8")
    assert re.search(r"^broken +FAILED", printed, re.M) and any("broken-seed42 failed" in line for line in record["advice"])


def test_replies_that_were_cut_are_told(compared):
    out, _, printed, record = compared
    ways = [run["name"] for system in record["systems"][:2] for run in system["runs"]]
    notes = {name: json.loads((out / name / "run.json").read_text(encoding="utf-8"))["evaluation"]["test"]["notes"] for name in ways}
    cut = {f"{name}: {note.partition(': ')[2]}" for name, own in notes.items() for note in own if note.startswith(f"{name[:4]}: ")}
    assert cut and cut <= set(record["notes"]) and all(f"note: {note}" in printed for note in cut)
    assert any(re.fullmatch(r"untuned: \d+ of \d+ replies did not end within 4 tokens and were cut", note) for note in record["notes"])


def test_the_table_fits_the_screen_and_markdown_holds_every_interval(compared):
    out, _, printed, record = compared
    table = printed[printed.index("6 dialogues from"):].split("\n\n")[1]
    assert max(map(len, table.splitlines())) <= 120
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["full", "lora", "untuned", "broken"]
    text = (out / "compare.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 6
    assert rows[2].count("[") == 5 and "**" not in text and "full: learning_rate=0.02" in text
    assert record["advice"][0] in text


def test_the_record_says_how_each_was_trained(compared):
    out, _, printed, record = compared
    assert record["configuration"]["max_length"] == 128 and "sentences" in record["doctor"]
    own = {system["name"]: system["configuration"] for system in record["systems"]}
    assert own["lora"]["rank"] == 8 and own["full"]["learning_rate"] == 0.02 and own["full"]["per_device_train_batch_size"] == 2
    assert own["broken"] == {} and record["report_language"] == "en"
    assert f"{out / 'report.html'}" in printed and 'id="training"' in (out / "report.html").read_text(encoding="utf-8")


def test_samples_hold_every_answer(compared):
    out, _, _, record = compared
    assert len(record["samples"]) == 10  # all assistant turns of 6 dialogues, fewer than 20
    first = record["samples"][0]
    assert first["context"][-1] == ["user", "Where is my order?"] and first["reference"] == "What is its number, please?"
    lines = [json.loads(line) for line in (out / "lora-seed42/predictions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sample["answers"]["lora"] for sample in record["samples"]] == [line["lora"] for line in lines]
    assert set(first["answers"]) == {"full", "lora", "untuned"}


def test_finished_runs_are_reused_and_more_may_be_added(compared, go, tmp_path):
    out, _, _, before = compared
    words = ["--seeds", "2", "--budget", "steps:3", "--grid", "full.learning_rate=0.02"]
    status, printed, calls = go(out, *FIRST, "prefix", *words)
    assert status == 0 and printed.count("reused") == 4
    assert [re.search(r"(train|evaluate)\.py", call)[1] for call in calls] == ["train", "train", "evaluate", "evaluate"]
    assert all("prefix" in call for call in calls)
    after = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert [system["name"] for system in after["systems"]] == ["full", "lora", "prefix", "untuned"]
    assert after["systems"][0]["scores"]["loss"]["mean"] == before["systems"][0]["scores"]["loss"]["mean"]
    with pytest.raises(UserError, match="other flags"):
        go(out, *FIRST, "--seeds", "2", "--budget", "steps:4")


def test_rows_that_changed_in_between_are_not_compared(compared, go, tmp_path):
    out = shutil.copytree(compared[0], tmp_path / "out")
    own, digest = out / "lora-seed42", compared[3]["data"]["train"]["sha256"]
    answers = json.loads((own / "predictions-test.jsonl").read_text(encoding="utf-8").split("\n")[0])
    [(_, items), *_] = json.loads((own / "losses-test.json").read_text(encoding="utf-8"))["lora"].values()
    for name, before, after in (("run.json", f'"sha256": "{digest}"', '"sha256": "0"'),
                                ("predictions-test.jsonl", json.dumps(answers["reference"], ensure_ascii=False), '"another"'),
                                ("losses-test.json", f", {items}]", ", 1.0]")):
        text = (own / name).read_text(encoding="utf-8")
        assert before in text
        (own / name).write_text(text.replace(before, after), encoding="utf-8")
        with pytest.raises(UserError, match="lora-seed42 and .*full.* saw other rows"):
            go(out, *FIRST, "--seeds", "2", "--budget", "steps:3", "--grid", "full.learning_rate=0.02")
        (own / name).write_text(text, encoding="utf-8")


def test_a_reply_may_hold_a_line_separator(tmp_path):
    lines = [{"row": 0, "reference": "one\u2028two\x85three\n", "lora": ""}, {"row": 1, "reference": "四", "lora": "\u2029"}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "predictions-test.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "losses-test.json").write_text("{}", encoding="utf-8")
    assert comparison_record.answers(tmp_path, "test") == (lines, {})


def test_an_interrupted_run_is_continued(go, tmp_path):
    out = tmp_path / "out"
    words = ["--recipes", "lora", "--budget", "steps:3", "--save_strategy", "steps", "--save_steps", "1"]
    _, _, [training, *_] = go(out, *words)
    assert not list((out / "lora-seed42").glob("checkpoint-*"))  # of a finished run, they only take room
    shutil.rmtree(out / "lora-seed42")
    assert test_cli.call(*shlex.split(training)[1:]).code == 0
    (out / "lora-seed42/run.json").unlink()
    _, _, calls = go(out, *words)
    assert "--resume_from_checkpoint" in calls[0]
    assert "resuming from" in (out / "logs/lora-seed42.log").read_text(encoding="utf-8")


WAITING = """
import signal, sys, time
def end(number, frame):
    print("checkpoint written", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
print("training", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_to_the_training_which_ends_in_its_own_way(number, tmp_path):
    log, ignored, own = tmp_path / "log", signal.getsignal(number), signal.default_int_handler
    signal.signal(number, own)  # where tests run in the background, SIGINT is ignored

    def interrupt():
        while not log.is_file() or "\ntraining" not in log.read_text(encoding="utf-8"):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(UserError, match="interrupted; the same command goes on from here"):
        comparison_runs.call([sys.executable, "-c", WAITING], log)
    thread.join()
    assert "checkpoint written" in log.read_text(encoding="utf-8") and signal.getsignal(number) == own
    signal.signal(number, ignored)


def test_a_process_that_was_killed_is_not_quoted(tmp_path):
    log = tmp_path / "log"
    status = comparison_runs.call([sys.executable, "-c", "import os; print('100%|##| 3/3', flush=True); os.kill(os.getpid(), 9)"], log)
    assert comparison_runs.why(status, log) == "ended by signal SIGKILL, as when memory runs out"
    status = comparison_runs.call([sys.executable, "-c", "print('error: no such thing'); exit(1)"], log)
    assert comparison_runs.why(status, log) == "no such thing"
    log.write_text("  0%|          | 0/1 [00:00<?, ?it/s]error: no [such] error: thing\n", encoding="utf-8")  # a bar ends no line
    assert comparison_runs.last_words(log) == "no [such] error: thing"


def test_when_all_fail_the_exit_status_says_so(go, broken, tmp_path):
    status, printed, _ = go(tmp_path / "out", "--recipes", broken, "--budget", "steps:1")
    assert status == 1 and "nothing to compare" in printed
    status, printed, _ = go(tmp_path / "diverged", "--recipes", "full", "--budget", "steps:3", "--learning_rate", "1e30", "--warmup_steps",
                            "0")
    assert status == 1 and "diverged" in printed


@pytest.mark.parametrize(("task", "kind", "row", "metrics"), [
    ("classify", "bert", {"text": "Where is my order?", "text_pair": "Hi", "label": "order"}, ["accuracy", "f1_macro", "loss"]),
    ("tag", "bert", {"tokens": ["Friday", "is", "fine"], "tags": ["B-day", "O", "O"]}, ["f1", "loss"]),
    ("translate", "t5", {"source": "Thank you!", "target": "谢谢"}, ["bleu", "chrf", "rougeL", "loss", "perplexity"]),
    ("pretrain", "llama", {"text": "Where is my order? " * 9}, ["loss", "perplexity"])])
def test_other_tasks(task, kind, row, metrics, go, tiny, write_jsonl, tmp_path):
    other = {"label": "thanks", "text": "Thank you!"} if task == "classify" else {}
    for split in ("train", "dev", "test"):
        path = write_jsonl([row, row | other] * 3, f"data/{split}.jsonl")
    status, printed, _ = go(tmp_path / "out", "--recipes", "full", "--task", task, "--model", tiny(kind), "--data", path.parent, "--budget",
                            "steps:1", *(["--from_scratch"] if task == "pretrain" else []))
    record = json.loads((tmp_path / "out/compare.json").read_text(encoding="utf-8"))
    assert status == 0 and set(record["metrics"]) == set(metrics) and record["main_metric"] == metrics[0]
    [own, *base] = record["systems"]
    assert [system["name"] for system in base] == ({
        "classify": ["label frequencies"], "tag": []}.get(task, ["untuned"]))
    table = json.loads((tmp_path / "out/full-seed42/run.json").read_text(encoding="utf-8"))["evaluation"]["test"]
    values = dict(zip(table["columns"], table["table"][-1]["values"], strict=True))
    assert {item_scores.METRICS[metric].title: own["scores"][metric]["mean"] for metric in metrics} == pytest.approx(
        {item_scores.METRICS[metric].title: values[item_scores.METRICS[metric].title] for metric in metrics})
    if task == "classify":  # three of each label in train and test
        assert record["samples"][0]["context"] == [["text", "Where is my order?"], ["text_pair", "Hi"]]
        assert base[0]["scores"]["accuracy"]["mean"] == 50 and base[0]["scores"]["loss"]["mean"] == pytest.approx(np.log(2))
    if task == "tag":
        sample = record["samples"][0]
        assert sample["reference"] == "day: Friday" and sample["context"] == [["text", "Friday is fine"]]
    assert own["costs"]["latency"] > 0
    if task == "pretrain":  # texts are joined, so what is drawn is blocks
        assert record["unit"] == "blocks" and 0 < record["items"] < 6 and record["samples"] == []
    else:
        assert record["samples"][0]["answers"].keys() == {system["name"] for system in record["systems"]}


def test_a_label_without_a_train_row_has_no_frequency():
    lines, losses = [{"row": i, "label": label} for i, label in enumerate(("a", "b", "none of them"))], {}
    comparison_record.add_frequencies(lines, losses, {"a": 4, "b": 0}, "guess")
    assert [line["guess"] for line in lines] == ["a"] * 3 and losses["guess"] == {0: [0.0, 1], 1: [0.0, 0], 2: [0.0, 0]}


# Choosing on dev


def test_a_grid_is_chosen_on_dev_and_only_the_choice_sees_the_test_rows(go, tmp_path):
    out = tmp_path / "out"
    _, printed, calls = go(out, "--recipes", "lora", "--grid", "lora.rank=2,4", "--grid", "lora.learning_rate=0.0001,0.05", "--budget",
                           "steps:3")
    record = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    [grid] = record["grid"]
    assert [point["settings"] for point in grid["points"]] == [
        {"rank": rank, "learning_rate": rate} for rank in ("2", "4") for rate in ("0.0001", "0.05")]
    values = [point["value"] for point in grid["points"]]
    [chosen] = [point for point in grid["points"] if point["chosen"]]
    assert chosen["value"] == min(values) < max(values) and chosen["settings"] == record["systems"][0]["settings"]
    for point in grid["points"]:
        run = json.loads((out / point["run"] / "run.json").read_text(encoding="utf-8"))
        assert run["metrics"]["dev_loss"] == point["value"] and run["method_arguments"]["rank"] == int(point["settings"]["rank"])
        assert ("evaluation" in run) == point["chosen"]
    assert [sum(script in call for call in calls) for script in ("train.py", "evaluate.py")] == [4, 1]
    assert "## Settings of lora on dev" in (out / "compare.md").read_text(encoding="utf-8")


def test_optuna_chooses_within_its_space(go, tmp_path):
    out = tmp_path / "out"
    _, printed, calls = go(out, "--recipes", "prefix", "--search", "3", "--budget", "steps:2", "--grid", "prefix.learning_rate=0.04")
    record = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    [search] = record["grid"]
    assert search["by"] == "search" and len(search["points"]) == 3
    for point in search["points"]:
        assert 0.8e-2 <= point["settings"]["learning_rate"] <= 20e-2 and point["settings"]["num_virtual_tokens"] in (10, 20, 50, 100)
    [best] = [point for point in search["points"] if point["chosen"]]
    assert best["value"] == min(point["value"] for point in search["points"] if point["value"] is not None)
    run = json.loads((out / record["systems"][0]["runs"][0]["name"] / "run.json").read_text(encoding="utf-8"))
    assert run["method_arguments"]["num_virtual_tokens"] == best["settings"]["num_virtual_tokens"]
    assert run["training_arguments"]["learning_rate"] == pytest.approx(best["settings"]["learning_rate"])
    assert run["metrics"]["dev_loss"] == pytest.approx(best["value"], rel=1e-4)  # the trial and the run are the same training
    assert record["systems"][0]["runs"][0]["name"].count("learning_rate=") == 1  # the one that was chosen


def test_settings_that_are_set_have_a_search_of_their_own(tmp_path, monkeypatch):
    called, settings = [], {"learning_rate": 0.1}

    def call(command, log):
        called.append(shlex.join(command))
        Path(command[command.index("--result") + 1]).write_text(
            json.dumps({"best": settings, "trials": [{"settings": settings, "value": 1.0, "state": "COMPLETE"}]}), encoding="utf-8")

    monkeypatch.setattr(comparison_runs, "call", call)
    plan = SimpleNamespace(options=SimpleNamespace(search=1), dev_metric="loss", seeds=[42], paths={"lora": "lora.py"}, common=[])
    for rank in (3, 5, 3):
        plan.grid = {"lora": [(("rank", rank), ("learning_rate", 0.2))]}
        _, chosen = comparison_runs.choose(plan, tmp_path)
        assert chosen == {"lora": (("rank", rank), ("learning_rate", 0.1))}
    assert ["--rank 3" in words for words in called] == [True, False]  # the third time, it is there


def test_a_search_judges_by_the_metric_that_decides(go, tiny, write_jsonl, tmp_path):
    rows = [{"text": text, "label": label} for text, label in [("my card is lost", "card"), ("where is it", "parcel")] * 4]
    for split in ("train", "dev", "test"):
        write_jsonl(rows, f"shop/{split}.jsonl")
    out, words = tmp_path / "out", ["--recipes", "lora", "--search", "2", "--task", "classify", "--model", tiny("bert"), "--data",
                                    tmp_path / "shop", "--budget", "steps:2", "--rank", "3"]
    _, printed, calls = go(out, *words, short=["--max_length", "32", "--use_cpu", "--bf16", "False"])
    record = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    [search] = record["grid"]
    [best] = [point for point in search["points"] if point["chosen"]]
    assert list(best["settings"]) == ["learning_rate"]  # the rank is given
    assert search["metric"] == "accuracy" and best["value"] == max(point["value"] for point in search["points"])
    assert best["value"] == record["systems"][0]["runs"][0]["dev"]["dev_accuracy"] == 100  # not 1: as on test
    assert f"best dev accuracy {best['value']:.4f}" in printed and "settings are chosen by dev loss" not in printed
    assert search_module.judged({"eval_loss": math.nan, "eval_accuracy": 50.0}, "accuracy", -math.inf) == -math.inf


def test_a_trial_scores_as_the_run_with_its_settings(shop, tiny, tmp_path):
    words = ["--model", tiny("llama"), "--data", shop, "--max_length", "128", "--use_cpu", "--no_bf16", "--learning_rate", "0.1",
             "--num_train_epochs", "5", "--early_stopping_patience", "2", "--per_device_train_batch_size", "2"]
    done = test_cli.call("recipes/common/search.py", "--recipe", "lora", "--trials", "2", "--result", tmp_path / "x.json", *words,
                         "--output_dir", tmp_path / "out")
    assert done.code == 0 and not (tmp_path / "out").exists(), done.err
    trials, ended_early = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["trials"], 0
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 2
    for at, trial in enumerate(trials):
        own = [word for name, value in trial["settings"].items() for word in (f"--{name}", value)]
        assert test_cli.call("recipes/lora.py", *words, *own, "--output_dir", tmp_path / str(at)).code == 0
        record = json.loads((tmp_path / str(at) / "run.json").read_text(encoding="utf-8"))
        losses = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry]
        assert trial["value"] == record["metrics"]["dev_loss"] == min(losses)
        ended_early += len(losses) < 6 and losses[-2] > min(losses)  # five epochs, and the best once more
    assert ended_early


def test_settings_that_a_recipe_refuses_cost_their_trial_alone(shop, tiny, tmp_path):
    """A prefix longer than the room beside the rows, and ranks that leave AdaLoRA nothing to take away."""
    for name, change in (("prefix", ("option(100,", "option(20,")), ("adalora", ("search=(4, 6, 8, 10)", "search=(12, 14, 16)"))):
        (tmp_path / f"{name}.py").write_text((ROOT / f"recipes/{name}.py").read_text(encoding="utf-8").replace(*change), encoding="utf-8")
    common = ["--model", tiny("llama"), "--data", shop, "--max_steps", "1", "--use_cpu", "--no_bf16", "--output_dir", tmp_path / "out"]
    words = ["recipes/common/search.py", *common, "--trials", "4", "--result", tmp_path / "x.json"]
    done = test_cli.call(*words, "--recipe", tmp_path / "prefix.py", "--max_length", "230")
    assert done.code == 0, done.err
    trials = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["trials"]
    refused = [trial for trial in trials if trial["settings"]["num_virtual_tokens"] > 26]
    assert 0 < len(refused) < len(trials) == 4
    assert done.out.count("is not trained: --max_length 230 and --num_virtual_tokens") == len(refused)
    assert all((trial["state"], "why" in trial) == (("PRUNED", True) if trial in refused else ("COMPLETE", False)) for trial in trials)
    (tmp_path / "x.json").unlink()
    test_cli.refused(test_cli.call(*words, "--recipe", tmp_path / "adalora.py", "--max_steps", "9"),
                     "4 of 4 trials could not be trained", "leaves nothing to take away", untouched=tmp_path / "x.json")


def test_a_choice_by_another_score_than_the_one_that_decides_is_told(go, tmp_path):
    out = tmp_path / "out"
    _, printed, _ = go(out, "--recipes", "lora", "--grid", "lora.rank=2,4", "--budget", "steps:2", "--metric", "bleu")
    record = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    said = "settings are chosen by dev loss, as bleu is not measured while training: --eval_generate_rows 32 measures it"
    assert record["grid"][0]["metric"] == "loss" and said in printed and said in record["notes"]


# More data


def test_a_curve_over_shares_of_the_data(go, tmp_path):
    out = tmp_path / "out"
    go(out, "--recipes", "lora", "--data_fractions", "0.25,0.5,1", "--num_train_epochs", "1", "--language", "zh")
    assert '<html lang="zh-CN">' in (out / "report.html").read_text(encoding="utf-8") and compare.language_before(out) == "zh"
    record = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    [curve] = record["learning_curves"]
    assert [point["rows"] for point in curve["points"]] == [3, 6, 12]
    assert any("a fourth would test it" in note for note in record["notes"])
    assert record["data"]["train"]["kept"] == 12  # the report's facts are of a run on all rows
    assert [point["rows"] for point in curve["extrapolation"]] == [24, 48]
    assert curve["points"][2]["value"] == record["systems"][0]["scores"]["loss"]["mean"]
    assert all(point["low"] <= point["high"] for point in curve["points"] + curve["extrapolation"])
    assert any(curve["sentence"] in line for line in record["advice"])
    assert "extrapolated" in (out / "compare.md").read_text(encoding="utf-8")


def of_means(values, items=400, noise=1.0, seed=0):
    """Counts of runs whose loss at `items` items is about each of `values`, on the same items."""
    own = np.random.default_rng(seed).normal(0, noise, items)
    return [[{"loss": np.column_stack([value + own, np.ones(items)])}] for value in values]


def test_what_twice_the_data_would_bring():
    drawn = statistics.draws(400, 500, 0)
    sizes = [100, 200, 400, 800]
    once = dict(zip(sizes, of_means([1 + 8 * n**-0.5 for n in sizes]), strict=True))
    falling = comparison.learning_curve("loss", {n: runs * 3 for n, runs in once.items()}, drawn)
    double = falling["extrapolation"][0]
    assert double["gain"] == pytest.approx(8 * 800**-0.5 - 8 * 1600**-0.5, rel=0.1) and double["gain_low"] > 0
    assert falling["sentence"].startswith("twice the rows (1600) would lower loss by about 0.08")
    few = comparison.learning_curve("loss", once, drawn)  # the same means, but nobody knows how much a repetition would differ
    assert few["extrapolation"][0]["gain_low"] > 0
    assert few["sentence"].startswith("can't tell whether more data would help: by the curve twice the rows lower loss by about 0.08")
    flat = comparison.learning_curve("loss", {n: of_means([2.0], seed=n)[0] for n in sizes}, drawn)
    assert flat["sentence"].startswith("can't tell whether more data would help")
    assert "2 amounts of data are too" in comparison.learning_curve("loss", {1: of_means([1])[0], 2: of_means([1])[0]}, drawn)["sentence"]
    assert "1 amount of data is too few" in comparison.learning_curve("loss", {1: of_means([1])[0]}, drawn)["sentence"]
    right = comparison.learning_curve("accuracy", {n: [{"accuracy": np.ones((400, 2))}] for n in sizes}, drawn)
    assert right["sentence"] == "more data can't raise accuracy on these held-out rows, as it is 100.00 already"


def test_shares_of_the_rows_lie_within_each_other(go, shop):
    from recipes.common import data, disk, tasks

    def share(size, seed, limit=None):
        train = data.Rows(disk.store(range(20)), "x", "0")
        tasks._draw_share(train, size, limit, seed)
        assert f"{len(train.rows)} of {limit or 20}" in train.notes[-1]
        return list(train.rows)

    assert [len(share(size, 1)) for size in (0.01, 0.25, 0.5)] == [1, 5, 10]
    assert share(0.5, 1)[:5] == share(0.25, 1) and share(0.5, 1) != share(0.5, 2)
    assert sorted(share(0.5, 1)) != list(range(10))  # drawn, not the first ones
    assert len(share(0.5, 1, limit=8)) == 4 and max(share(0.5, 1, limit=8)) < 8  # --max_train_samples: of the rows that are trained on


# Budgets


def test_a_budget_of_tokens_is_kept_with_a_whole_schedule(go, tmp_path):
    out = tmp_path / "out"
    _, printed, _ = go(out, *FIRST, "--budget", "tokens:900", "--save_strategy", "no")
    assert printed.count("--load_best_model_at_end is off") == 1  # both recipes say so
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*/run.json")]
    per_step = runs[0]["tokens"] / runs[0]["steps"]
    for run in runs:
        assert abs(run["tokens"] - 900) <= 1.5 * per_step and run["steps"] > 3
        rates = [entry["learning_rate"] for entry in run["history"] if "learning_rate" in entry]
        assert rates[-1] < 0.3 * run["training_arguments"]["learning_rate"]  # the cosine has ended
    assert runs[0]["steps"] == runs[1]["steps"]


def test_a_budget_of_minutes_ends_the_training(go, tmp_path):
    out = tmp_path / "out"
    _, printed, calls = go(out, "--recipes", "lora", "--budget", "minutes:0.01")
    run = json.loads((out / "lora-seed42/run.json").read_text(encoding="utf-8"))
    assert 0 < run["steps"] < 6000 and run["training_arguments"]["lr_scheduler_type"] == "constant_with_warmup"
    assert "--max_minutes 0.01: stopped after" in (out / "logs/lora-seed42.log").read_text(encoding="utf-8")
    assert "the learning rate is constant after the warm-up" in printed


@pytest.mark.parametrize(("text", "given", "flags"), [
    (None, set(), []), ("steps:20", set(), ["--max_steps", "20"]), ("tokens:5000", {"max_length"}, ["--max_tokens", "5000"]),
    ("minutes:1.5", {"lr_scheduler_type"}, ["--max_minutes", "1.5", "--num_train_epochs", "1000"])])
def test_what_a_budget_stands_for(text, given, flags):
    assert compare.budget(text, given) == flags


# Advice


def recorded(losses: dict[str, float], seconds: dict[str, float] | None = None, spread=0.05, items=400, **more) -> dict:
    """A record of systems whose items' losses differ by `spread` around a common one."""
    generator = np.random.default_rng(1)
    common = generator.normal(0, 1, items)
    common -= common.mean()
    systems = {name: [{"loss": np.column_stack([loss + common + generator.normal(0, spread, items), np.ones(items)])}]
               for name, loss in losses.items()}
    base = "untuned" if "untuned" in losses else None
    found = comparison.score(systems, base, statistics.draws(items, 1000, 0))
    seconds = seconds or dict.fromkeys(losses, 100.0)
    return {"task": "chat", "main_metric": "loss", "items": items, "unit": "dialogues", "split": "test", "seeds": [42, 43],
            "best": {"loss": found["loss"]["best"]},
            "systems": [{"name": name, "base": name == base, "scores": {"loss": found["loss"]["systems"][name]}, "settings": {},
                         "costs": {"seconds": seconds[name], "disk_mb": 10.0 if name == "lora" else 500.0},
                         "runs": [{"name": f"{name}-seed42", "status": "done", "error": None, "still_improving": False}]}
                        for name in losses], **more}


def test_a_clear_winner_is_named():
    [line] = comparison.advice(recorded({"full": 2.0, "lora": 2.1, "prefix": 2.3, "untuned": 3.0}))
    assert re.match(r"take full: its loss (1\.99|2\.00)\d \[1\.9\d\d, 2\.\d{3}\] is better than that of every other \(p <= 0\.0", line)


def test_no_winner_where_there_is_none_and_the_cheapest_is_named():
    [line] = comparison.advice(recorded({"full": 2.0, "lora": 2.0, "untuned": 3.0}, {"full": 100, "lora": 60, "untuned": 0}, spread=2))
    assert line.startswith("no clear winner:") and "the cheapest of them is lora (60 s of training, 10.0 MB on disk)" in line
    [line] = comparison.advice(recorded({"full": 2.0, "lora": 2.0, "untuned": 3.0}, {"full": 100, "lora": 105, "untuned": 0}, spread=2))
    assert "the cheapest of them is lora" in line  # as fast within a tenth, and smaller
    [line] = comparison.advice(recorded({"full": 2.0, "lora": 2.0, "prefix": 2.6, "untuned": 3.5}, spread=1))
    assert line.startswith("no clear winner among 2 of 3:") and "prefix" not in line


@pytest.mark.parametrize(("change", "part"), [
    ({"items": 30}, "30 held-out dialogues are few"), ({"split": "dev"}, "there are no test rows"), ({"seeds": [42]}, "one seed")])
def test_warnings(change, part):
    lines = comparison.advice(recorded({"full": 2.0, "lora": 2.1, "untuned": 3.0}, **({"items": 30} if "items" in change else {}))
                              | change)
    assert len(lines) == 2 and part in lines[1] and lines[1].startswith("warning: ")


def test_a_training_that_did_not_help_is_said():
    for losses, spread in (({"full": 2.0, "lora": 2.1, "untuned": 2.0}, 1.0), ({"full": 2.0, "lora": 2.1, "untuned": 1.5}, 0.05)):
        lines = comparison.advice(recorded(losses, spread=spread))
        assert any("no evidence that the training helped" in line for line in lines)


def test_a_training_that_ended_too_early_is_said():
    record = recorded({"full": 2.0, "lora": 2.1, "untuned": 3.0})
    record["systems"][1]["runs"][0]["still_improving"] = True
    assert "lora still improved at the last evaluation" in comparison.advice(record)[1]

    def history(*losses):
        return [{"step": i, "eval_loss": loss} for i, loss in enumerate(losses)]

    assert comparison.still_improving(history(3.0, 2.5, 2.2)) and not comparison.still_improving(history(3.0, 2.5, 2.499))
    assert not comparison.still_improving(history(2.5)) and not comparison.still_improving([{"step": 1, "loss": 2.0}])
    # The last line is the best checkpoint, scored once more at the end.
    assert not comparison.still_improving([*history(3.0, 2.2, 2.4), {"step": 2, "eval_loss": 2.2}])


def test_higher_is_better_where_it_is():
    counts = {name: [{"accuracy": np.column_stack([np.arange(100) < hits, np.ones(100)])}] for name, hits in (("a", 60), ("b", 80))}
    found = comparison.score(counts, None, statistics.draws(100, 500, 0))["accuracy"]
    assert found["best"] == "b" and found["systems"]["a"]["mean"] == 60 and found["systems"]["a"]["against_best"]["difference"] == -20
    assert found["systems"]["a"]["against_best"]["p_holm"] < 0.05 and found["systems"]["a"]["against_base"] is None


# Mistakes


@pytest.mark.parametrize(("words", "parts"), [
    (["--recipes", "lorra"], ["unknown recipe lorra", "full"]),
    ([*FIRST, "--model", "./nowhere"], ["nowhere"]),
    (["--recipes", "lora", "lora"], ["same name"]),
    ([*FIRST, "--seeds", "0"], ["--seeds", "'0'"]),
    ([*FIRST, "--budget", "steps"], ["--budget steps", "steps:100"]),
    ([*FIRST, "--budget", "steps:0"], ["--budget steps:0"]),
    ([*FIRST, "--budget", "steps:9", "--max_steps", "3"], ["--budget", "--max_steps"]),
    ([*FIRST, "--grid", "lora.rnk=4,8"], ["lora has no flag rnk", "rank"]),
    ([*FIRST, "--grid", "prefix.rank=4,8"], ["--grid prefix.rank=4,8", "full, lora"]),
    ([*FIRST, "--grid", "lora.rank=4,,8"], ["--grid lora.rank=4,,8"]),
    ([*FIRST, "--grid", "lora.rank=0"], ["lora: ", "--rank", "'0'"]),
    ([*FIRST, "--grid", "lora.rank=4", "--grid", "lora.rank=8"], ["given twice"]),
    ([*FIRST, "--grid", "lora.rank=4,8", "--search", "3"], ["--search", "--grid"]),
    ([*FIRST, "--hardware", "recipes/accelerate/ddp.yaml", "--search", "3"], ["--search", "--hardware"]),
    ([*FIRST, "--rank", "4"], ["full: ", "unknown flag --rank"]),
    ([*FIRST, "--metric", "accuracy"], ["--metric accuracy", "bleu"]),
    ([*FIRST, "--task", "classify", "--multi_label", "--metric", "f1_macro"], ["--metric f1_macro", "--multi_label has accuracy, loss"]),
    ([*FIRST, "--data_fractions", "0.5,x"], ["--data_fractions", "'x'"]),
    ([*FIRST, "--data_fractions", "0.25,0.5"], ["--data_fractions 0.25,0.5", "and 1"]),
    ([*FIRST, "--train_fraction", "0.5"], ["--data_fractions"]),
    ([*FIRST, "--budget", "steps:9", "--num-train-epochs", "3"], ["--budget", "leave --num_train_epochs out"]),
    ([*FIRST, "--hardware", "nowhere.yaml"], ["--hardware nowhere.yaml", "no such file"]),
    ([*FIRST, "adalora", "--budget", "minutes:1"], ["adalora: ", "--max_minutes"]),
    ([*FIRST, "--data", "nowhere"], ["--data nowhere"]),
])
def test_a_mistake_is_told_before_anything_is_trained(words, parts, tiny, tmp_path):
    model = [] if "--model" in words else ["--model", tiny("llama")]  # the bundled one may have to be converted first
    refused(test_cli.call("scripts/compare.py", *words, *model, "--output_dir", tmp_path / "out"), *parts, untouched=tmp_path / "out")


def test_a_folder_of_other_things_and_a_file_that_is_no_recipe_are_refused(tiny, tmp_path, broken):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("all of it", encoding="utf-8")
    refused(test_cli.call("scripts/compare.py", *FIRST, "--model", tiny("llama"), "--output_dir", tmp_path / "out"),
            "holds files that are no comparison's")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    for text, part in (("def main(:", "is no Python file"), ("x = 1\n", "defines no MethodArguments")):
        (tmp_path / "mine.py").write_text(text, encoding="utf-8")
        refused(test_cli.call("scripts/compare.py", "--recipes", tmp_path / "mine.py", "--output_dir", tmp_path / "new"), part)


def test_a_damaged_record_is_told_before_anything_is_trained(tmp_path):
    (tmp_path / "compare.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="compare.json is damaged .*: delete it; the runs are kept"):
        compare.language_before(tmp_path)
    assert compare.language_before(tmp_path / "new") == "en"


def test_all_read_as_much_of_a_row_as_the_one_that_takes_positions(tiny, shop, capsys):
    words = ["--recipes", "lora", "prefix", "--model", str(tiny("llama")), "--data", str(shop), "--use_cpu", "--grid"]
    plan = compare.check(*compare.parse([*words, "prefix.num_virtual_tokens=20,50"]))
    assert plan.common[-2:] == ["--max_length", "206"] and "note: --max_length 206 for all" in capsys.readouterr().out
    plan = compare.check(*compare.parse([*words, "prefix.num_virtual_tokens=20", "--max_length", "100"]))
    assert plan.common.count("--max_length") == 1 and "for all" not in capsys.readouterr().out


def test_seeds_need_the_same_held_out_rows(tiny, write_jsonl, tmp_path):
    path = write_jsonl(DIALOGUES)
    refused(test_cli.call("scripts/compare.py", *FIRST, "--model", tiny("llama"), "--data", path, "--seeds", "2", "--output_dir",
                          tmp_path / "out"), "--seeds", "no test file")
    refused(test_cli.call("scripts/compare.py", *FIRST, "--model", tiny("llama"), "--data", path, "--streaming", "--budget", "steps:1",
                          "--output_dir", tmp_path / "out"), "--streaming", "no test file", untouched=tmp_path / "out")


@pytest.mark.parametrize(("words", "parts"), [
    (["--train_fraction", "0"], ["--train_fraction 0"]), (["--train_fraction", "1.5"], ["--train_fraction 1.5"]),
    (["--max_tokens", "10", "--max_steps", "4"], ["--max_tokens", "--max_steps"])])
def test_flags_of_a_recipe_that_contradict_each_other(words, parts):
    with pytest.raises(UserError, match=".*".join(map(re.escape, parts))):
        args.parse("", args.Method, words)


def test_search_refuses_what_it_cannot_follow(shop, tiny, tmp_path):
    for words, parts in ((["--adversarial", "fgm"], ["--search", "--adversarial"]),
                         (["--metric", "bleu"], ["--metric bleu is not measured", "--eval_generate_rows"])):
        refused(test_cli.call("recipes/common/search.py", "--recipe", "lora", "--trials", "1", "--result", tmp_path / "x.json", "--model",
                              tiny("llama"), "--data", shop, *words, "--output_dir", tmp_path / "out"), *parts,
                untouched=tmp_path / "x.json")


@pytest.mark.slow
def test_real_processes(shop, tiny, tmp_path):
    done = subprocess.run([sys.executable, "scripts/compare.py", "--recipes", "full", "lora", "--model", tiny("llama"), "--data", shop,
                           "--budget", "steps:2", "--output_dir", tmp_path / "out", *SHORT], capture_output=True, text=True, cwd=ROOT,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^lora +\d\.\d{3} \[", done.stdout, re.M) and "untuned" in done.stdout and not done.stderr
    record = json.loads((tmp_path / "out/compare.json").read_text(encoding="utf-8"))
    assert [system["status"] for system in record["systems"]] == ["done"] * 3
    assert set(record["metrics"]) == set(item_scores.OF_TASK["chat"])
