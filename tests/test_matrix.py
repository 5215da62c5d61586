"""Every method with every task on every kind of model: two steps change exactly what the method trains, and a loaded run is the same.
What is refused is refused before any data is read, and the READMEs' table says so."""

import json
import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import DIALOGUES
from matrix import LANGUAGES, METHODS, ROOT, TASKS, cells, table, written
from test_classify import ROWS as LABELLED
from test_methods import Watched, run_recipe
from test_pretrain import ROWS as TEXTS
from test_tag import ROWS as TAGGED
from test_translate import ROWS as PAIRS
from transformers import AutoTokenizer, BertForMaskedLM, MarianConfig, T5Config, T5ForConditionalGeneration

from recipes import full, lora, prefix
from recipes.common import args, models, tasks
from recipes.common.errors import UserError
from recipes.common.scoring import dataset_outputs

ROWS = {"chat": DIALOGUES, "classify": LABELLED, "tag": TAGGED, "translate": PAIRS, "pretrain": TEXTS}
KINDS = {"gpt2": "decoder", "llama": "decoder", "bert": "encoder", "t5": "encoder-decoder"}
# What a method trains, beside the new head of a task that has one.
OWN = {"full": r".*", "lora": r".*\.lora_[AB]\.default\.weight", "adalora": r".*\.lora_[ABE]\.default",
       "prefix": r"prompt_encoder\.default\..*", "adapter": r".*\.bottleneck_(down|up)\.default\.(weight|bias)"}
HEAD = r".*\b(classifier|score|classification_head)\.modules_to_save\.default\..*"
WORKS = {"chat": ("gpt2", "llama"), "classify": ("bert", "gpt2", "llama", "t5"), "tag": ("bert", "gpt2", "llama", "t5"),
         "translate": ("t5", "gpt2", "llama"), "pretrain": ("bert", "gpt2", "llama")}
# Task and kind of model -> why it is refused, by every method.
REFUSED = {("chat", "t5"): "is an encoder-decoder .*a dialogue is one text", ("chat", "bert"): "is an encoder .*can't write",
           ("translate", "bert"): "is an encoder .*can't write",
           ("pretrain", "t5"): "is an encoder-decoder .*filling in spans"}
# The same, where a method refuses what the others can do.
REFUSED_BY = {("classify", "t5", "prefix"): "PEFT can't put a prefix", ("tag", "t5", "prefix"): "PEFT can't put a prefix"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for task, rows in ROWS.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows * 2), encoding="utf-8")
    return {task: folder / f"{task}.jsonl" for task in ROWS}


@pytest.mark.parametrize(("task", "kind", "method"), [
    cell for task, kinds in WORKS.items() for cell in product([task], kinds, METHODS) if cell not in REFUSED_BY])
def test_a_cell_works(task, kind, method, tiny, files, tmp_path):
    run = tmp_path / "run"
    trainer = run_recipe(method, tiny(kind), files[task], run, "--task", task, "--learning_rate", "0.05",
                         "--max_steps", "4" if method == "adalora" else "2", "--warmup_steps", "0", "--lr_scheduler_type", "constant",
                         "--load_best_model_at_end", "False",
                         "--eval_strategy", "no", "--save_strategy", "no", trainer_class=Watched)
    assert trainer.args.metric_for_best_model == {"classify": "accuracy", "tag": "f1"}.get(task, "loss")
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
    assert record["metrics"].keys() == {f"dev_{name}" for name in args.DEV_SCORES[task] if name not in args.WRITTEN}
    again = tasks.of_run(record, models.load_run_tokenizer(run))
    loaded = models.load_run(run, torch.float32, again.auto_class, again.config)
    rows = tasks.module(task).rows(ROWS[task], tasks.flags(record))
    features, _ = again.encode(rows, "rows")
    for one, other in zip(*(dataset_outputs(model.eval(), again, features, "x") for model in (trainer.model, loaded)), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("task", "score", "best"), [("classify", "accuracy", max), ("tag", "eval_f1", max), ("tag", "loss", min)])
def test_the_best_checkpoint_is_the_best_whatever_it_is_measured_by(task, score, best, tiny, files, tmp_path):
    trainer = run_recipe("full", tiny("bert"), files[task], tmp_path / "run", "--task", task, "--num_train_epochs", "12",
                         "--learning_rate", "0.03", "--metric_for_best_model", score)
    values = [entry[f"eval_{score.removeprefix('eval_')}"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == best(values) and len(set(values)) > 1


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


@pytest.mark.parametrize(("task", "kind", "method"), [*((*cell, method) for cell in REFUSED for method in METHODS), *REFUSED_BY])
def test_a_refused_cell_says_why_before_any_data_is_read(task, kind, method, tiny, tmp_path):
    with pytest.raises(UserError, match=REFUSED.get((task, kind)) or REFUSED_BY[task, kind, method]):
        run_recipe(method, tiny(kind), tmp_path / "no-such-data", tmp_path / "run", "--task", task, "--max_steps", "2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("task", "error", "words"), [
    ("classify", ValueError, "exactly one of input_ids or inputs_embeds"), ("tag", UserError, "t5 models take no keys and values")])
def test_without_its_refusal_a_prefix_before_a_t5_classifier_fails(task, error, words, tiny, files, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix.MethodArguments, "refuses", lambda *cell: None)
    with pytest.raises(error, match=words):
        run_recipe("prefix", tiny("t5"), files[task], tmp_path / "run", "--task", task, "--start", "random", "--max_steps", "2")


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_which_keys_and_values_of_a_t5_prefix_learn(layers, capsys):
    """The layers of the decoder take theirs two places apart, so of an even number half are never read; the run says so."""
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=layers, num_heads=4,
                                                decoder_start_token_id=0))
    task = SimpleNamespace(peft_type="SEQ_2_SEQ_LM", window=None, new_modules=lambda: None)
    model, _ = prefix.adapt(model, task, prefix.MethodArguments(num_virtual_tokens=5, start="random"), None)
    ids = torch.arange(12).reshape(2, 6) + 3
    model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids).logits.pow(2).mean().backward()
    [trained] = [p for p in model.parameters() if p.requires_grad]
    assert trained.shape == (5, 2 * layers * 16)
    learns = trained.grad.reshape(5, layers, -1).abs().sum((0, 2)) > 0
    assert {layer for layer in range(layers) if learns[layer]} == {2 * layer % layers for layer in range(layers)}
    assert ("half of the" in capsys.readouterr().out) == (not learns.all()) == (layers % 2 == 0)


def test_a_type_of_model_that_transformers_has_no_class_for_is_refused_too(tmp_path):
    folder = tmp_path / "marian"
    MarianConfig(vocab_size=10).save_pretrained(folder)
    source = models.Source("marian", "marian", str(folder))
    tasks.check_cell("translate", source, lora.MethodArguments())
    with pytest.raises(UserError, match="transformers has no model of the type marian for it"):
        tasks.check_cell("classify", source, lora.MethodArguments())


def test_top_layers_of_two_stacks_are_refused_before_any_data_is_read(tiny):
    source = models.Source("t5", "t5", str(tiny("t5")))
    tasks.check_cell("translate", source, full.MethodArguments())
    with pytest.raises(UserError, match="leave --train_top_layers out"):
        tasks.check_cell("translate", source, full.MethodArguments(train_top_layers=1))


@pytest.mark.parametrize(("task", "kind", "top"), [
    ("classify", "bert", r"bert\.(encoder\.layer\.1\..*|pooler\..*)|classifier\..*"),
    ("tag", "bert", r"bert\.encoder\.layer\.1\..*|classifier\..*"),
    ("classify", "gpt2", r"transformer\.(h\.1\..*|ln_f\..*)|score\..*"), ("tag", "llama", r"model\.(layers\.1\..*|norm\..*)|score\..*"),
])
def test_the_top_layers_of_a_classifier_are_trained_with_its_head(task, kind, top, tiny, files, tmp_path):
    trainer = run_recipe("full", tiny(kind), files[task], tmp_path / "run", "--task", task, "--train_top_layers", "1", "--max_steps", "2",
                         "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "False", trainer_class=Watched)
    now = dict(trainer.model.named_parameters())
    changed = {name for name, before in trainer.before.items() if not torch.equal(before, now[name])}
    assert {name for name in now if re.fullmatch(top, name)} == {name for name, p in now.items() if p.requires_grad}
    assert changed and changed <= {name for name, p in now.items() if p.requires_grad}


def test_every_cell_is_one_or_the_other_and_the_code_says_so(tiny):
    assert {kind: models.kind(models.Source(kind, kind, str(tiny(kind)))) for kind in KINDS} == KINDS
    assert set(TASKS) == ROWS.keys()
    expected = {(task, kind, method): kind in WORKS[task] and (task, kind, method) not in REFUSED_BY
                for task in TASKS for kind in KINDS for method in METHODS}
    assert not REFUSED.keys() & {(task, kind) for task, kinds in WORKS.items() for kind in kinds}
    assert all(cell[:2] in REFUSED or cell in REFUSED_BY for cell, works in expected.items() if not works)
    found = cells()
    assert {(task, kind, method): found[task, KINDS[kind], method] is None for task, kind, method in expected} == expected


@pytest.mark.parametrize("readme", LANGUAGES)
def test_the_readme_holds_the_table_of_now(readme, monkeypatch):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert table(LANGUAGES[readme]) in text
    assert written(text, LANGUAGES[readme]) == text, "python tests/matrix.py"
    monkeypatch.setattr(prefix.MethodArguments, "refuses", lambda *cell: None)
    assert written(text, LANGUAGES[readme]) != text
