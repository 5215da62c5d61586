"""train.py, evaluate.py and chat.py on tiny models, from the first command to what lies in the run folder."""

import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
import time
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from conftest import DIALOGUES, ROOT
from test_classify import ROWS
from test_cli import RECIPES, call, refused, shell
from test_methods import run_recipe

from recipes.common import checkpoints, data, deadline, errors, formats, models, runs
from recipes.common.errors import UserError

SHORT = ["--max_length", "128", "--num_train_epochs", "2", "--logging_steps", "1"]
HOSTILE = '<script>alert("&amp;")</script><img src=x onerror=alert(1)>'

# Everything that DESIGN's "run folder" asks run.json for, and what else makes a run repeatable.
FIELDS = {"recipe", "task", "model", "command", "finished", "data", "trainable_parameters", "total_parameters", "steps", "seconds",
          "resumes", "tokens", "tokens_per_second", "padding_share", "peak_memory_mb", "best_checkpoint", "metrics", "method_arguments",
          "shared_arguments", "training_arguments", "versions", "hardware", "history", "world_size"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A data folder: 12 train rows (one with markup in it), 4 test rows in two languages, no dev file."""
    folder = tmp_path_factory.mktemp("shop")
    hostile = {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"No {HOSTILE}"}]}
    for name, rows in (("train", [*DIALOGUES * 2, *DIALOGUES[:3], hostile]), ("test", [hostile, *DIALOGUES[:3]])):
        text = "".join(json.dumps({"id": f"{name}-{i}", **row}, ensure_ascii=False) + "\n" for i, row in enumerate(rows))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(shop, tiny, tmp_path_factory):
    """trained("lora") -> (run folder, what was printed): one run per recipe, made by scripts/train.py when first asked for."""
    made, folder = {}, tmp_path_factory.mktemp("runs")

    def make(recipe: str):
        if recipe not in made:
            out = folder / f"{recipe}-tiny"
            result = call("scripts/train.py", "--recipe", recipe, "--model", tiny("gpt2"), "--data", shop, "--output_dir", out, *SHORT)
            assert result.code == 0, result.err
            made[recipe] = out, result
        return made[recipe]

    return make


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished LoRA run, to write to."""
    return shutil.copytree(trained("lora")[0], tmp_path / "run")


def read(folder, name="run.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


# train.py


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_end_to_end(recipe, trained, tiny, shop):
    folder, result = trained(recipe)
    record = read(folder)
    assert record.keys() == FIELDS | ({"method_report"} if recipe == "adalora" else set())
    assert record["recipe"] == recipe and record["task"] == "chat"
    model = str(tiny("gpt2"))
    assert record["model"] == {"requested": model, "used": model, "folder": model, "revision": None, "from_scratch": False}
    assert record["steps"] == 4 and record["training_arguments"]["output_dir"] == str(folder)
    assert record["versions"].keys() >= {"python", "torch", "transformers", "peft"}
    assert record["versions"]["transformers"] == version("transformers")
    assert 0 < record["trainable_parameters"] <= record["total_parameters"]
    assert (record["trainable_parameters"] == record["total_parameters"]) == (recipe == "full")
    assert record["tokens"] == 2 * record["data"]["splits"]["train"]["tokens"]  # two epochs, no padding counted
    assert record["tokens_per_second"] > 0 and record["seconds"] > 0 and record["peak_memory_mb"] > 50
    assert record["metrics"]["dev_loss"] == pytest.approx(read_loss(result.out), abs=1e-4)
    assert record["best_checkpoint"].startswith(str(folder / "checkpoint-"))

    splits = record["data"]["splits"]
    assert (splits["train"]["rows"], splits["dev"]["rows"]) == (11, 1)
    assert splits["train"]["sha256"] == data.read(shop / "train.jsonl", data.check_dialogue).sha256
    assert 0 < splits["train"]["supervised"] < splits["train"]["tokens"]

    files = {path.name for path in folder.iterdir()}
    weights = {"config.json", "model.safetensors"} if recipe == "full" else {"adapter_config.json", "adapter_model.safetensors"}
    assert files >= {"run.json", "report.html", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                     "checkpoint-2", "checkpoint-4", *weights}
    assert not {"run.json.tmp", "model.safetensors" if recipe != "full" else "adapter_config.json"} & files
    assert any(path.stat().st_size > 500 for path in folder.rglob("events.out.tfevents.*"))

    for said in (f"run folder {folder}", "train: 11 of 11 dialogues", "plain one (User: / Assistant:)",
                 f"scripts/evaluate.py --run {folder}"):
        assert said in result.out
    assert ("Tokenizing" in result.err or "from the cache" in result.out) and "it/s" in result.err  # progress bars


def read_loss(text: str) -> float:
    return float(re.search(r"^dev loss (\S+), dev perplexity", text, re.M)[1])


def test_run_json_repeats_the_run(trained, tmp_path):
    """Its command, run again elsewhere, ends at the same loss."""
    folder, _ = trained("lora")
    launcher, file, *words = shlex.split(read(folder)["command"])
    assert launcher == "python"
    words[words.index("--output_dir") + 1] = str(tmp_path / "again")
    assert call(os.path.abspath(file), *words).code == 0
    again, first = read(tmp_path / "again"), read(folder)
    assert again["metrics"] == first["metrics"]
    assert again["data"] == first["data"] and again["method_arguments"] == first["method_arguments"]


def test_resume_alone_continues_the_newest_checkpoint(trained, tmp_path, run):
    record = read(run)
    words = shlex.split(record["command"])[2:]
    words[words.index("--output_dir") + 1] = str(run)
    (run / "run.json").unlink()  # as if it was killed before its end
    words[words.index("--num_train_epochs") + 1] = "3"
    refused = call("recipes/lora.py", *words, "--resume_from_checkpoint")
    assert refused.code == 1 and re.search(r"num_train_epochs was 2.0, now 3.0\).*--allow_changed num_train_epochs", refused.err)
    result = call("recipes/lora.py", *words, "--resume_from_checkpoint", "--allow_changed", "num_train_epochs")
    assert result.code == 0, result.err
    assert f"resuming from {run / 'checkpoint-4'}" in result.out
    assert read(run)["steps"] == 6


def test_a_finished_run_is_left_alone_and_trained_further_elsewhere(run, tmp_path):
    words = shlex.split(read(run)["command"])[2:]
    words[words.index("--output_dir") + 1] = str(run)
    assert call("scripts/evaluate.py", "--run", run, "--split", "test", "--limit", "1", "--max_new_tokens", "4").code == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = call("recipes/lora.py", *words, "--resume_from_checkpoint")
    assert result.code == 0 and result.out.splitlines()[-1] == f"{run}: finished at step 4; nothing to do"
    words[words.index("--num_train_epochs") + 1] = "3"
    last = run / "checkpoint-4"
    on = ("--resume_from_checkpoint", str(last), "--allow_changed", "num_train_epochs")
    result = call("recipes/lora.py", *words, "--resume_from_checkpoint")
    refused(result, f"{run} holds a finished run with other settings (num_train_epochs was 2.0, now 3.0)", f"{shlex.join(on)}")
    refused(call("recipes/full.py", *words, "--resume_from_checkpoint"), f"{run} holds a finished run", "(recipe was lora, now full")
    words[words.index("--output_dir") + 1] = str(tmp_path / "on")
    result = call("recipes/lora.py", *words, *on)
    assert result.code == 0 and read(tmp_path / "on")["steps"] == 6, result.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_json_of_another_program_is_refused(run):
    words = shlex.split(read(run)["command"])[2:]
    words[words.index("--output_dir") + 1] = str(run)
    for text in ("{}", "[1]", "?"):
        (run / "run.json").write_text(text, encoding="utf-8")
        refused(call("recipes/lora.py", *words, "--resume_from_checkpoint"), f"{run}: its run.json is no finished run's")
        assert (run / "run.json").read_text(encoding="utf-8") == text


def test_accelerate_launch_is_the_documented_way(tiny, shop, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/one_process.yaml"]
    result = shell(*launcher, "scripts/train.py", "--recipe", "lora", "--model", tiny("llama"), "--data", shop,
                   "--output_dir", tmp_path / "out", "--max_steps", "1", "--max_length", "128")
    assert result.code == 0, result.err
    assert read(tmp_path / "out")["steps"] == 1
    assert read(tmp_path / "out")["command"].startswith("python recipes/lora.py --model")


# A user's own recipe


def own_recipe(path, rank: int):
    """LoRA with another default rank, as a user would edit it."""
    text = (ROOT / "recipes/lora.py").read_text(encoding="utf-8")
    assert "rank: int = option(8," in text
    path.write_text(text.replace("rank: int = option(8,", f"rank: int = option({rank},"), encoding="utf-8")
    return path


def test_a_copied_recipe_runs_from_any_folder(tiny, shop, tmp_path):
    """As a process of its own in another folder, so that only the installed package can help it."""
    mine = own_recipe(tmp_path / "mine.py", rank=3)
    command = f"cd {shlex.quote(str(tmp_path))} && exec {shlex.quote(sys.executable)} mine.py {shlex.join(tiny_words(tiny, shop))}"
    result = shell("bash", "-c", command + " --output_dir out")
    assert result.code == 0, result.err
    record = read(tmp_path / "out")
    assert record["recipe"] == mine.stem and record["method_arguments"]["rank"] == 3
    assert record["command"].startswith("python mine.py ")


def tiny_words(tiny, shop) -> list[str]:
    return ["--model", str(tiny("gpt2")), "--data", str(shop), "--max_steps", "1", "--max_length", "128"]


def test_a_copied_recipe_is_found_by_path_and_by_name(tiny, shop, tmp_path, monkeypatch):
    mine = own_recipe(tmp_path / "mine.py", rank=5)
    result = call("scripts/train.py", "--recipe", mine, *tiny_words(tiny, shop), "--output_dir", tmp_path / "by-path")
    assert result.code == 0, result.err
    assert read(tmp_path / "by-path")["method_arguments"]["rank"] == 5

    # A second project folder, so that the test leaves nothing in this one: the script looks into recipes/ beside itself.
    (tmp_path / "project/recipes").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", tmp_path / "project/scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(mine, tmp_path / "project/recipes/mine.py")
    train = tmp_path / "project/scripts/train.py"
    assert "  mine       LoRA: freeze the model" in call(train, "--help").out
    result = call(train, "--recipe", "mine", *tiny_words(tiny, shop), "--output_dir", tmp_path / "by-name")
    assert result.code == 0, result.err
    assert read(tmp_path / "by-name")["recipe"] == "mine"
    assert call(train, "--recipe=mine", "--help").out.startswith("usage: mine.py")


def test_a_recipes_default_run_folder_names_recipe_and_model(tiny, shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("recipes/lora.py", *tiny_words(tiny, shop)).code == 0
    assert read(tmp_path / "runs/lora-gpt2")["recipe"] == "lora"


# evaluate.py


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluate_every_recipe(recipe, trained, tmp_path):
    run = shutil.copytree(trained(recipe)[0], tmp_path / "run")
    result = call("scripts/evaluate.py", "--run", run, "--base", "--max_new_tokens", "6", "--json", tmp_path / "scores.json")
    assert result.code == 0, result.err
    untuned = f"{read(run)['model']['used']} (untuned)"
    header, *rows = [line for line in result.out.splitlines() if re.search(r"\breplies +loss|(?:\d+\.\d\d +){8}", line + " ")]
    assert header.split() == ["replies", "loss", "perplexity", "BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L", "chrF", "distinct-1", "distinct-2"]
    assert [row.split()[0] for row in rows] == ["en", recipe, "zh", recipe, "all", recipe]
    assert all(untuned in row for row in rows[::2])

    evaluation = read(run)["evaluation"]["test"]
    assert evaluation["rows"] == 4 and evaluation["table"][-1]["count"] == 6
    table = {(row["language"], row["model"]): dict(zip(evaluation["columns"], row["values"], strict=True)) for row in evaluation["table"]}
    assert len(table) == 6
    for language in ("en", "zh", "all"):
        tuned, base = table[language, recipe], table[language, untuned]
        assert tuned["loss"] != base["loss"] and tuned["perplexity"] == pytest.approx(math.exp(tuned["loss"]))
    for part in ("BLEU", "ROUGE F1", "greedy, at most 6 new tokens"):
        assert part in evaluation["signature"] and part in result.out
    assert read(tmp_path, "scores.json")["table"] == evaluation["table"]

    lines = [json.loads(line) for line in (run / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["turn"]) for line in lines] == [("test-0", 1), ("test-1", 2), ("test-1", 4), ("test-2", 1),
                                                            ("test-3", 1), ("test-3", 3)]
    assert lines[3]["reference"] == "好的，请告诉我订单号。" and lines[3]["language"] == "zh"
    assert all(isinstance(line[recipe], str) and isinstance(line[untuned], str) for line in lines)
    for said in ("reference | ", f"{recipe} | ", "next:", f"scripts/chat.py --run {run}"):
        assert said in result.out


def test_the_loss_is_the_one_of_training(run):
    """Dev loss of evaluate.py in fp32 equals the one that the training ended with, up to bf16 where the training used it."""
    assert call("scripts/evaluate.py", "--run", run, "--split", "dev", "--max_new_tokens", "2", "--dtype", "float32").code == 0
    record = read(run)
    everything = next(row for row in record["evaluation"]["dev"]["table"] if row["language"] == "all")
    assert everything["values"][0] == pytest.approx(record["metrics"]["dev_loss"], rel=5e-3)


def test_evaluate_dev_draws_the_same_held_out_share(run, shop):
    """The rows scored are exactly those that the training held out."""
    result = call("scripts/evaluate.py", "--run", run, "--split", "dev", "--max_new_tokens", "4")
    assert result.code == 0 and "1 row held out, seed 42" in result.out
    record = read(run)
    [expected] = data.load(str(shop), data.check_dialogue, 0.1, 42)["dev"].rows
    predicted = [json.loads(line)["id"] for line in (run / "predictions-dev.jsonl").read_text(encoding="utf-8").splitlines()]
    assert set(predicted) == {expected["id"]}
    assert record["evaluation"]["dev"]["source"] == record["data"]["splits"]["dev"]["source"]


def test_evaluations_of_several_splits_live_side_by_side(run):
    for split in ("test", "dev", "train"):
        assert call("scripts/evaluate.py", "--run", run, "--split", split, "--limit", "1", "--max_new_tokens", "2").code == 0
    record = read(run)
    assert record["evaluation"].keys() == {"test", "dev", "train"} and record.keys() == FIELDS | {"evaluation"}
    assert all(evaluation["rows"] == 1 for evaluation in record["evaluation"].values())
    assert (run / "report.html").read_text(encoding="utf-8").count("<h3>Evaluation on ") == 2 * 3


def test_evaluate_on_another_file(run, write_jsonl):
    """A file is taken whole. Rows without id are numbered, and a language is found where none is given."""
    file = write_jsonl(DIALOGUES[1:3], "other.jsonl")
    result = call("scripts/evaluate.py", "--run", run, "--data", file, "--max_new_tokens", "2")
    assert result.code == 0, result.err
    assert f"2 dialogues from {file}" in result.out
    name = f"{file.parent.name}-other"
    lines = [json.loads(line) for line in (run / f"predictions-{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert read(run)["evaluation"].keys() == {name}  # beside the scores on the run's own rows, not in their place
    assert [(line["id"], line["language"]) for line in lines] == [(0, "zh"), (1, "en"), (1, "en")]


def test_a_bad_row_in_other_data_is_told(run, write_jsonl):
    before = (run / "run.json").read_bytes()
    file = write_jsonl([DIALOGUES[1], '{"messages": '], "other.jsonl")
    result = call("scripts/evaluate.py", "--run", run, "--data", file)
    refused(result, f"{file}, row 2: broken JSON", "mend this row or take it out")
    assert "--on_bad_row" not in result.err  # a flag of the training
    assert (run / "run.json").read_bytes() == before and not list(run.glob("predictions*"))


def main_of(script):
    spec = importlib.util.spec_from_file_location(f"{script}_script", ROOT / f"scripts/{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_rows_to_evaluate_on_that_do_not_come_are_waited_for_no_longer_than_asked(run, write_jsonl, monkeypatch):
    records = formats.records
    monkeypatch.setattr(formats, "records", lambda file: (time.sleep(60 * i) or row for i, row in enumerate(records(file))))
    monkeypatch.setattr(deadline, "limit", 0)
    file = write_jsonl(DIALOGUES, "other.jsonl")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", str(run), "--data", str(file), "--data_timeout", "1"])
    with pytest.raises(UserError, match=r"other\.jsonl: the data did not come within 1 s .--data_timeout"):
        main_of("evaluate")()


@pytest.mark.parametrize("script", ["evaluate", "report"])
def test_a_disk_that_is_full_when_results_are_written_is_told_and_nothing_is_half_written(script, run, tmp_path, monkeypatch):
    """Full from the first result on: what was asked before any work still fits."""
    def full(path, text):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    monkeypatch.setattr(checkpoints, "write", full)
    flags = ["--limit", "1", "--max_new_tokens", "2"] if script == "evaluate" else ["--language", "zh"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--run", str(run), *flags])
    with pytest.raises(UserError, match=f"{re.escape(str(run))} can't be written .No space left on device.: make room"):
        main_of(script)()
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_folder_that_is_read_only_is_told_before_anything_is_scored(run, monkeypatch):
    def refuse(**kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(errors.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(models, "load_run", None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", str(run), "--limit", "1"])
    with pytest.raises(UserError, match=f"{re.escape(str(run))} can't be written .Read-only file system"):
        main_of("evaluate")()


def test_a_long_chinese_name_of_a_file_is_no_longer_than_a_disk_allows(run, write_jsonl):
    file = write_jsonl(DIALOGUES[1:2], f"{'很长的文件夹名' * 8}/{'客服对话' * 10}.jsonl")
    result = call("scripts/evaluate.py", "--run", run, "--data", file, "--max_new_tokens", "2")
    assert result.code == 0, result.err
    assert len(list(run.glob("predictions-很长的文件夹名*.jsonl"))) == 1


def test_a_label_that_the_run_does_not_know_is_told_with_its_file(tiny, tmp_path, write_jsonl):
    run_recipe("full", tiny("bert"), write_jsonl(ROWS), tmp_path / "run", "--task", "classify", "--max_steps", "1")
    file = write_jsonl([ROWS[0], ROWS[1] | {"label": "a (new) one"}], "other.jsonl")
    result = call("scripts/evaluate.py", "--run", tmp_path / "run", "--data", file)
    refused(result, f"error: {file}, row 2: label 'a (new) one' does not occur in the train rows; mend this row or take it out")


def test_a_diverged_run_can_still_be_evaluated(run):
    """NaN is written as a string, as JSON has no number for it; whoever reads it back must cope."""
    record = read(run)
    record["metrics"]["dev_loss"] = record["metrics"]["dev_perplexity"] = float("nan")
    record["history"].append({"step": 5, "loss": float("inf")})
    runs.write(run, record)
    assert read(run)["metrics"]["dev_loss"] == "nan"
    result = call("scripts/evaluate.py", "--run", run, "--limit", "1", "--max_new_tokens", "2")
    assert result.code == 0, result.err
    assert "nan" in (run / "report.html").read_text(encoding="utf-8")


# report.html


def test_the_report_is_one_safe_file(run):
    assert call("scripts/evaluate.py", "--run", run, "--base", "--limit", "1", "--max_new_tokens", "2", "--samples", "1").code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page and "&lt;script&gt;" in page  # the dialogue is shown, as text
    assert "<script" not in page and "<img" not in page
    assert check_page(page) == []
    assert "<svg" in page and "Answers side by side" in page and "BLEU" in page


def check_page(page: str) -> list[str]:
    """What in `page` would make a browser ask the network: the schema names inside the SVG never do."""
    tags = " ".join(re.findall(r"<[^>]*>", page))  # in the text between them it means nothing
    fetching = re.findall(r"""(?:\bsrc|\bhref|\baction|\bdata|\bposter)\s*=\s*["']?(?![#"'])[^\s"'>]+""", tags)
    return fetching + re.findall(r"@import|url\(\s*['\"]?(?!#)[^)]*\)|<(?:link|script|iframe|object|embed)\b", page)


@pytest.mark.parametrize("page", ['<a href="https://example.org">', "<script>1</script>", "<style>@import 'x'</style>",
                                  "<img src=//example.org/x.png>", "<p style='background: url(http://x)'>", '<link rel="icon">'])
def test_a_page_with_an_external_link_is_found(page):
    assert check_page(page)


# chat.py


def test_one_message(trained):
    folder, _ = trained("prefix")
    result = call("scripts/chat.py", "--run", folder, "--message", "Where is my order?", "--max_new_tokens", "8")
    assert result.code == 0 and result.err == "(cut at 8 tokens: --max_new_tokens allows more)\n"
    assert result.out.endswith("\n") and result.out.count("\n") >= 1
    model, tokenizer = models.load_run(folder), models.load_run_tokenizer(folder)
    system = read(folder)["data"]["system"]
    assert system == "You are the assistant of a shop."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Where is my order?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0, ids.shape[1]:]
    assert result.out.strip() == tokenizer.decode(expected, skip_special_tokens=True).removesuffix("\N{REPLACEMENT CHARACTER}").strip()


def test_a_piped_conversation(trained, tmp_path, tiny, write_jsonl):
    """Two conversations are saved, an unknown command and a reset in between; what is saved trains again."""
    folder, _ = trained("lora")
    saved = tmp_path / "saved.jsonl"
    lines = ["/save", f"/save {saved}", "Hello!", "", "Where is my parcel?", f"/save {saved}", "/reset", "/dance", "我想退货。",
             f"/save {saved}", f"/save {tmp_path / 'no/such/folder'}", "/quit", "never read"]
    result = call("scripts/chat.py", "--run", folder, "--max_new_tokens", "8", stdin="\n".join(lines))
    assert result.code == 0 and "Traceback" not in result.err, result.err
    said = [line for line in result.out.splitlines() if line.startswith("(")]
    for part, line in zip(["name a file: /save FILE", "nothing to save yet", "saved 5 turns", "a new conversation",
                           "unknown command /dance", "saved 3 turns", "can't be written"], said, strict=True):
        assert part in line
    assert "you>" not in result.out  # no prompt where nobody types
    first, second = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert [m["role"] for m in first["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in second["messages"] if m["role"] == "user"] == ["我想退货。"]
    assert [data.check_dialogue(row) for row in (first, second)] == [None, None]

    result = call("recipes/lora.py", "--model", tiny("gpt2"), "--data", saved, "--output_dir", tmp_path / "out", "--max_steps", "1",
                  "--max_length", "250")
    assert result.code == 0, result.err


def test_a_conversation_ends_with_its_input(trained):
    """End of input is as good as /quit; a real pipe, and the system turn can be set or left out."""
    folder, _ = trained("lora")
    command = f"printf 'hi\\n' | {shlex.quote(sys.executable)} scripts/chat.py --run {shlex.quote(str(folder))} --max_new_tokens 3"
    result = shell("bash", "-c", command + " --system ''")
    assert result.code == 0 and result.out.endswith("\n") and "Traceback" not in result.err


def test_a_long_conversation_loses_its_oldest_turns(trained):
    """The window is 256 tokens: the first turns go, which is said, and the conversation goes on."""
    folder, _ = trained("lora")
    text = "\n".join(["Where is my order? Is it on the way?"] * 12)
    result = call("scripts/chat.py", "--run", folder, "--max_new_tokens", "16", stdin=text)
    assert result.code == 0 and "oldest turns no longer fit" in result.err
    alone = call("scripts/chat.py", "--run", folder, "--max_new_tokens", "16", "--message", "Where is my order? " * 60)
    refused(alone, "longer than the model's window")
    goes_on = call("scripts/chat.py", "--run", folder, "--max_new_tokens", "4", stdin="Where is my order? " * 60 + "\nhi\n/quit\n")
    assert goes_on.code == 0 and goes_on.err.count("longer than the model's window") == 1


def test_only_a_reply_that_was_cut_loses_part_of_a_character(trained, monkeypatch, capsys):
    folder, _ = trained("lora")
    model, tokenizer = models.load_run(folder), models.load_run_tokenizer(folder)
    start, part = tokenizer("Hi 你", add_special_tokens=False)["input_ids"], "\N{REPLACEMENT CHARACTER}"
    half = next(start[:i] for i in range(len(start), 0, -1) if tokenizer.decode(start[:i]).endswith(part))
    talk = runpy.run_path(str(ROOT / "scripts/chat.py"))["Conversation"](model, tokenizer, None, 8, 0.0)
    for end, said in (([], "Hi"), ([tokenizer.eos_token_id], f"Hi {part}")):
        def generate(input_ids, streamer, written=(*half, *end), **options):
            for tokens in (input_ids, *(torch.tensor([token]) for token in written)):
                streamer.put(tokens)
            streamer.end()
            return torch.cat([input_ids, torch.tensor([written])], 1)

        monkeypatch.setattr(model, "generate", generate)
        assert talk.reply("hello") == said == capsys.readouterr().out.strip()


def test_sampling_is_repeatable(trained):
    folder, _ = trained("lora")
    words = ["--run", folder, "--message", "hi", "--max_new_tokens", "12", "--temperature", "5"]
    texts = [call("scripts/chat.py", *words, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# Each script alone


def test_scripts_hide_no_package():
    """Python puts scripts/ first on the path, where evaluate.py would stand before the package `evaluate`."""
    for name in ("train", "evaluate", "chat", "doctor"):
        program = f"import runpy, sys; sys.path.insert(0, 'scripts'); sys.argv = ['scripts/{name}.py']\nrunpy.run_path(sys.argv[0])\n"
        result = shell(sys.executable, "-c", program + "import importlib.util; print(importlib.util.find_spec('evaluate').origin)")
        assert result.code == 0 and result.out.strip().endswith("evaluate/__init__.py"), result.err


def test_latency_passes_over_rows_that_the_model_can_not_read():
    def encode(rows, *args):
        raise UserError("the model's chat template refuses every dialogue")

    candidate, latency = SimpleNamespace(load=lambda: None, task=SimpleNamespace(name="chat", encode=encode)), {}
    runpy.run_path(str(ROOT / "scripts/evaluate.py"))["timed"](
        "lora", candidate, [{"messages": []}], {}, SimpleNamespace(latency=1, max_new_tokens=1), latency)
    assert math.isnan(latency["lora"])
