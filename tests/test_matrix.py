"""Every method with every task on every kind of model: two steps change exactly what the method trains, and a loaded run is the same."""

import json
import re

import pytest
import torch
from conftest import DIALOGUES
from test_classify import ROWS as LABELLED
from test_methods import Watched, run_recipe
from test_pretrain import ROWS as TEXTS
from test_tag import ROWS as TAGGED
from test_translate import ROWS as PAIRS
from transformers import AutoTokenizer, BertForMaskedLM

from recipes.common import models, tasks
from recipes.common.errors import UserError
from recipes.common.trainer import dataset_outputs

ROWS = {"chat": DIALOGUES, "classify": LABELLED, "tag": TAGGED, "translate": PAIRS, "pretrain": TEXTS}
METHODS = ("full", "lora", "adalora", "prefix", "adapter")
# What a method trains, beside the new head of a task that has one.
OWN = {"full": r".*", "lora": r".*\.lora_[AB]\.default\.weight", "adalora": r".*\.lora_[ABE]\.default",
       "prefix": r"prompt_encoder\.default\..*", "adapter": r".*\.bottleneck_(down|up)\.default\.(weight|bias)"}
HEAD = r".*\b(classifier|score)\.modules_to_save\.default\..*"
WORKS = {"chat": ("gpt2", "llama"), "classify": ("bert", "gpt2", "llama"), "tag": ("bert", "gpt2", "llama"),
         "translate": ("t5", "gpt2", "llama"), "pretrain": ("bert", "gpt2", "llama")}
# Task and kind of model -> why it is refused, by every method.
REFUSED = {("chat", "t5"): "can't be", ("chat", "bert"): "no end-of-text token", ("classify", "t5"): "is an encoder-decoder",
           ("tag", "t5"): "is an encoder-decoder", ("translate", "bert"): "no end-of-text token",
           ("pretrain", "t5"): "is an encoder-decoder, which learns text by filling in spans"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for task, rows in ROWS.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows * 2), encoding="utf-8")
    return {task: folder / f"{task}.jsonl" for task in ROWS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("task", "kind"), [(task, kind) for task, kinds in WORKS.items() for kind in kinds])
def test_a_cell_works(task, kind, method, tiny, files, tmp_path):
    run = tmp_path / "run"
    trainer = run_recipe(method, tiny(kind), files[task], run, "--task", task, "--learning_rate", "0.05",
                         "--max_steps", "4" if method == "adalora" else "2", "--warmup_steps", "0", "--lr_scheduler_type", "constant",
                         "--load_best_model_at_end", "False",
                         "--eval_strategy", "no", "--save_strategy", "no", trainer_class=Watched)
    now = dict(trainer.model.named_parameters())
    changed = {name for name, before in trainer.before.items() if not torch.equal(before, now[name])}
    expected = {name for name in now if re.fullmatch(OWN[method], name) or re.fullmatch(HEAD, name)}
    untouched = {name for name in expected if re.search(r"k_proj\.bias|key\.bias|position_embeddings|wpe|token_type", name)}  # no effect
    if method == "adalora":  # a value that is taken away is zero again, and so is the update of its row
        untouched |= {name for name in expected if "lora_" in name}
        assert any("lora_E" in name for name in changed)
    assert changed <= expected and expected - changed <= untouched | {n for n in expected if "pooler" in n and task == "tag"}
    assert any(re.fullmatch(HEAD, name) for name in changed) == (task in ("classify", "tag") and method != "full")

    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    again = tasks.of_run(record, models.load_run_tokenizer(run))
    loaded = models.load_run(run, torch.float32, again.auto_class, again.config)
    rows = tasks.module(task).rows(ROWS[task], tasks.flags(record))
    features, _ = again.encode(rows, "rows")
    for one, other in zip(*(dataset_outputs(model.eval(), again, features, "x") for model in (trainer.model, loaded)), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_saved_too(method, tiny, files, tmp_path):
    BertForMaskedLM.from_pretrained(tiny("bert")).save_pretrained(tmp_path / "bert")  # this class has no pooler
    AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(tmp_path / "bert")
    run = tmp_path / "run"
    trainer = run_recipe(method, tmp_path / "bert", files["classify"], run, "--task", "classify", "--max_steps", "4", "--learning_rate",
                         "0.05", "--load_best_model_at_end", "False", trainer_class=Watched)
    now = dict(trainer.model.named_parameters())
    assert any("pooler" in name and not torch.equal(before, now[name]) for name, before in trainer.before.items())
    again = tasks.of_run(json.loads((run / "run.json").read_text(encoding="utf-8")), models.load_run_tokenizer(run))
    features, _ = again.encode(LABELLED, "rows")
    loaded = models.load_run(run, torch.float32, again.auto_class, again.config)
    for one, other in zip(*(dataset_outputs(model.eval(), again, features, "x") for model in (trainer.model, loaded)), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("task", "kind"), REFUSED)
def test_a_refused_cell_says_why(task, kind, method, tiny, files, tmp_path):
    with pytest.raises(UserError, match=REFUSED[task, kind]):
        run_recipe(method, tiny(kind), files[task], tmp_path / "run", "--task", task, "--max_steps", "2")
    assert not (tmp_path / "run").exists()


def test_every_cell_is_one_or_the_other():
    cells = {(task, kind) for task in ROWS for kind in ("gpt2", "llama", "bert", "t5")}
    assert cells == {(task, kind) for task, kinds in WORKS.items() for kind in kinds} | REFUSED.keys()
