"""Secrets stay out of everything that a run writes or says, and curves that can't be written cost nothing else."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import DIALOGUES, ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_methods import run_recipe

from recipes.common import curves, errors, redaction, runs

STEPS = ("--max_steps", "2", "--per_device_train_batch_size", "1", "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "1",
         "--eval_strategy", "no", "--load_best_model_at_end", "False")
TOKEN = "hf_" + "aB3" * 10
PLANTED = {"MY_SERVICE_API_KEY": "a-key-of-no-known-shape", "DB_PASS": "hunter22", "GITHUB_PAT": "pat.of.no.shape",
           "SESSION_COOKIE": "chocolate1", "PROXY_AUTH": "me-and-only-me",
           "AWS_CREDENTIAL": "credulous9", "SOME_TOKEN": "tok-en-tok", "MY_SECRET": "s3cr3t-thing"}
ADDRESS = "https://user:pass-in-url@host/x?token=query-token&page=7"


@pytest.fixture
def planted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return [*PLANTED.values(), TOKEN, "pass-in-url", "query-token"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in DIALOGUES), encoding="utf-8")
    return folder


def holding(folder, secrets) -> list:
    """The files below `folder` that hold one of the secrets."""
    return [(path.name, secret) for path in folder.rglob("*") if path.is_file() for secret in secrets
            if secret.encode() in path.read_bytes()]


def test_no_secret_reaches_the_run_folder(planted, tiny, data, tmp_path, monkeypatch):
    name = " ".join([*PLANTED.values(), ADDRESS])
    words = ["--hub_token", TOKEN, "--run_name", name, "--report_to", "tensorboard"]
    monkeypatch.setattr(runs, "command", lambda world_size: "python recipes/lora.py " + " ".join(words))
    run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, *words[:6], "--project", name)
    assert holding(tmp_path / "run", planted) == []
    record = (tmp_path / "run/run.json").read_text(encoding="utf-8")
    assert "--hub_token <secret>" in record and "<DB_PASS>" in record and "page=7" in record
    assert not list((tmp_path / "run").rglob("*.bin"))
    (tmp_path / "run/leak.txt").write_text(PLANTED["DB_PASS"])
    assert holding(tmp_path / "run", planted) == [("leak.txt", "hunter22")]
    [events] = (tmp_path / "run").rglob("events.out.tfevents*")
    seen = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in seen.Scalars("train/loss")] == [1, 2]
    told = seen.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"hub_token": "<HUB_TOKEN>"' in told and "<MY_SECRET>" in told and '"max_steps": 2' in told


def test_no_secret_is_told_with_an_error(planted, capsys):
    errors._tell(errors.UserError, errors.UserError(f"can't reach {ADDRESS} with {TOKEN}"), None)
    errors._tell(ValueError, ValueError(PLANTED["DB_PASS"]), None)
    told = capsys.readouterr().err
    assert not [secret for secret in planted if secret in told]
    assert "error: can't reach https://<secret>@host/x?token=<secret>&page=7 with <secret>" in told and "ValueError: <DB_PASS>" in told


def test_an_error_of_a_real_process_is_told_without(planted):
    done = subprocess.run([sys.executable, "recipes/lora.py", "--data", "x", "--hub_token_", "hunter22"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 1 and "hunter22" not in done.stderr and "error: " in done.stderr


@pytest.mark.parametrize(("text", "shown"), [
    ("--push_to_hub_token=abc --rank 4", "--push_to_hub_token=<secret> --rank 4"), ("--hub_token 'a b' x", "--hub_token <secret> x"),
    ("--api-key abc", "--api-key <secret>"), ("http://me:pw@host/x", "http://<secret>@host/x"), ("https://abc@host", "https://<secret>@host"),
    ("postgres://me:pw@host/x", "postgres://me:<secret>@host/x"), ("x?api_key=1&page=2", "x?api_key=<secret>&page=2"),
    ("s3?X-Amz-Signature=ab12", "s3?X-Amz-Signature=<secret>"), ("Authorization: Bearer abcdefgh1", "Authorization: Bearer <secret>"),
    ("ghp_" + "x" * 20, "<secret>"), ("github_pat_" + "x" * 30, "<secret>"), ("glpat-" + "x" * 20, "<secret>"),
    *((text, text) for text in (
        "data/customer_service", "hf_internal_testing/tiny-gpt2", "--max_tokens 500 --tokens_per_step 4096", "git@github.com:a/b",
        "https://host/a@b", "the key= is under the mat", "at 12:30 me@host.org")),
])
def test_what_looks_like_a_secret_is_hidden(text, shown):
    assert redaction.redacted({"a": [text]}) == {"a": [shown]}


def test_entries_whose_names_say_so_are_hidden():
    assert redaction.redacted({"hub_token": "abc", "password": "abc", "n": {"api_key": ""}, "eos_token": "</s>", "secrets": 3}) == {
        "hub_token": "<secret>", "password": "<secret>", "n": {"api_key": ""}, "eos_token": "</s>", "secrets": 3}


def test_what_is_no_secret_stays(monkeypatch, tmp_path):
    for name, value in {"TOKENIZERS_PARALLELISM": "falsehood", "MYPATH": "customer_service", "GIT_AUTHOR_NAME": "customer", "KEY": "data",
                        "SSH_KEY_FILE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    text = f"falsehood data/customer_service {tmp_path}/run"
    assert redaction.redacted(text) == text


def logged(args, curve):
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    curve.on_train_begin(args, state, None)
    for state.global_step in (1, 2, 3):
        curve.on_log(args, state, None, logs={"loss": 1.0})


def test_curves_that_can_not_be_written_are_told_once(tmp_path, monkeypatch):
    args, told = SimpleNamespace(output_dir=str(tmp_path), to_dict=dict), []
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    logged(args, curves.Curves(told.append))
    assert told == [] and list((tmp_path / "curves").iterdir())
    full = curves.Curves(told.append)
    full.file = open("/dev/full", "wb", buffering=0)
    logged(args, full)
    [sentence] = told
    assert "No space left on device" in sentence and "the training goes on without them" in sentence
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))
    logged(args, curves.Curves(told.append))
    assert len(told) == 2


def test_a_training_goes_on_without_its_curves(tiny, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))
    run_recipe("lora", tiny("gpt2"), data, tmp_path / "run", *STEPS, "--report_to", "tensorboard")
    [event] = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["events"]
    assert event["event"].startswith("the curves for TensorBoard can't be written (File exists)")


def test_a_name_that_is_too_long_is_told_in_a_sentence(capsys):
    with pytest.raises(OSError) as found:
        open("x" * 300)
    errors._tell(OSError, found.value, None)
    assert capsys.readouterr().err == f"error: {'x' * 80}... is too long for the name of a file: give a shorter one\n"
