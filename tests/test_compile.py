"""--torch_compile: blocks compiled in place with the results and the files of a run without it, and what is refused."""

import importlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file
from test_methods import data, run_recipe  # noqa: F401  `data` is a fixture
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, TrainingArguments, set_seed

from recipes import lora
from recipes.common import args, compilation, cpu_attention, losses
from recipes.common.chat import IGNORE
from recipes.common.errors import UserError

CLASSES = {"bert": (AutoModelForMaskedLM, "FEATURE_EXTRACTION"), "t5": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM")}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(kind, method, layers=1):
    """A model of `layers` blocks (T5: on either side) without dropout, adapted by a recipe."""
    set_seed(0)
    config = tiny_config(kind)
    config.update({name: 0.0 for name in config.to_dict() if "dropout" in name or name.endswith("pdrop")})
    config.update({name: layers for name in ("num_hidden_layers", "num_decoder_layers") if hasattr(config, name)})
    auto_class, peft_type = CLASSES.get(kind, (AutoModelForCausalLM, "CAUSAL_LM"))
    task = SimpleNamespace(peft_type=peft_type, new_modules=lambda: None, window=256, max_length=64, method_report={}, steps=None,
                           train=[{"input_ids": [5, 6, 7] * 10}])
    recipe = importlib.import_module(f"recipes.{method}")
    training = SimpleNamespace(max_steps=100, process_index=0)
    return recipe.adapt(auto_class.from_config(config), task, recipe.MethodArguments(), training)[0].train()


def arguments(**options):
    return TrainingArguments(output_dir="unused", use_cpu=True, torch_compile=True, **options)


def graphs():
    return counters["stats"]["unique_graphs"]


def step(model, rows, length, padding):
    """(loss, gradients by name) of random rows, the first of them with `padding` at its end."""
    ids = torch.randint(3, 400, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, length - padding:] = 0
    network = losses.network(model)
    cpu_attention.choose(network, length)
    loss_of = losses.next_token if type(network).__name__.endswith("ForCausalLM") or "GPT2" in type(network).__name__ else losses.same_token
    model.zero_grad()
    labels = ids.masked_fill(mask == 0, IGNORE)
    loss = sum(part.nll().mean() for part in loss_of(model, {"input_ids": ids, "attention_mask": mask, "labels": labels}))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind, method", [("gpt2", "full"), ("gpt2", "prefix"), ("llama", "lora"), ("llama", "adalora"),
                                          ("bert", "adapter"), ("t5", "full")])
def test_values_and_gradients_are_those_of_the_model_as_it_is(kind, method):
    loss, gradients = step(make(kind, method), 3, 18, 4)
    model = make(kind, method)
    names = list(model.state_dict())
    with compilation.compiled_blocks(losses.network(model), arguments(torch_compile_backend="eager")):
        step(model, 3, 18, 4)
        assert graphs() == 0  # evaluation and generation
        with compilation.running():
            compiled_loss, compiled_gradients = step(model, 3, 18, 4)
        assert graphs() > 0
        assert list(model.state_dict()) == names
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
    assert compiled_gradients.keys() == gradients.keys()
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-4, atol=1e-6)
    before = graphs()
    step(model, 3, 20, 5)
    assert graphs() == before  # nothing stays behind


def test_blocks_and_lengths_share_what_was_compiled():
    model = make("llama", "lora", layers=3)
    with compilation.compiled_blocks(losses.network(model), arguments(torch_compile_backend="eager")), compilation.running():
        step(model, 3, 18, 4)
        first = graphs()
        assert first <= 7  # 2 or 4 blocks have as many
        for rows, length, padding in ((2, 30, 3), (5, 11, 2)):
            step(model, rows, length, padding)
        assert graphs() == first


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_with_inductor():
    loss, gradients = step(make("gpt2", "full"), 3, 18, 4)
    model = make("gpt2", "full")
    with compilation.compiled_blocks(losses.network(model), arguments()), compilation.running():
        compiled_loss, compiled_gradients = step(model, 3, 18, 4)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-3, atol=1e-5)


def test_a_run_has_the_losses_and_files_of_one_without_it(tiny, data, tmp_path, capsys):  # noqa: F811
    def run(name, *flags):
        trainer = run_recipe("full", tiny("gpt2"), data, tmp_path / name, "--max_steps", "2", "--per_device_train_batch_size", "4",
                             "--logging_steps", "1", "--learning_rate", "0.001", "--warmup_steps", "0", "--save_strategy", "steps",
                             "--save_steps", "1", "--micro_batch_tokens", "1000", "--model_dropout", "0", *flags)
        files = {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")}
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], files

    plain, files = run("plain")
    assert "torch.compile" not in capsys.readouterr().out
    compile_it = ("--torch_compile", "--torch_compile_backend", "eager")
    compiled, compiled_files = run("compiled", *compile_it)
    assert "note: torch.compile works for a minute or more" in capsys.readouterr().out
    assert graphs() > 0
    assert compiled == pytest.approx(plain, rel=1e-4) and len(plain) == 2 and plain[0] != plain[1]
    assert compiled_files == files and "checkpoint-2/model.safetensors" in files
    name = "model.safetensors"
    tuned, compiled_tuned = load_file(tmp_path / "plain" / name), load_file(tmp_path / "compiled" / name)
    torch.testing.assert_close(compiled_tuned, tuned, rtol=1e-3, atol=1e-5)
    shutil.rmtree(tmp_path / "compiled/checkpoint-2")
    (tmp_path / "compiled/run.json").unlink()  # as if it had not come to its end
    resumed, _ = run("compiled", *compile_it, "--resume_from_checkpoint")
    assert resumed == pytest.approx(compiled, abs=1e-9)
    torch.testing.assert_close(load_file(tmp_path / "compiled" / name), compiled_tuned, rtol=0, atol=0)


def parse(*flags):
    return args.parse(lora.__doc__, lora.MethodArguments, ["--use_cpu", "--no_bf16", "--report_to", "none", *flags])


@pytest.mark.parametrize("flags, message", [
    (("--torch_compile_backend", "fast"), "--torch_compile_backend fast: PyTorch has .*inductor"),
    (("--torch_compile_backend", "eager", "--torch_compile_mode", "max-autotune"), "--torch_compile_mode is for the backend inductor"),
    (("--torch_compile_mode", "fast"), "--torch_compile_mode fast: there are default, .*max-autotune"),
    (("--torch_compile", "--activation_checkpointing"), "--activation_checkpointing computes them again: leave one of them out"),
    (("--torch_compile", "--fsdp", "full_shard"), "--torch_compile was never tried with FSDP")])
def test_what_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse(*flags)


def test_it_is_refused_where_a_launcher_divides_the_blocks(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="--torch_compile was never tried with FSDP"):
        compilation.check(SimpleNamespace(torch_compile_backend="inductor", torch_compile_mode=None, activation_checkpointing=False,
                                          gradient_checkpointing=False, fsdp=[], deepspeed=None))


def test_without_a_compiler_it_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--torch_compile needs a C\+\+ compiler, and there is no no-such-compiler here: install one"):
        parse("--torch_compile")
    parse("--torch_compile", "--torch_compile_backend", "eager")  # which needs none
    monkeypatch.setenv("CXX", "python3")
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: "no-such-folder")
    with pytest.raises(UserError, match="--torch_compile needs the headers of Python"):
        parse("--torch_compile")


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="--torch_compile: Linear has no blocks"), \
            compilation.compiled_blocks(torch.nn.Linear(2, 2), arguments(torch_compile_backend="eager")):
        pass
