"""The fused LoRA forward against PEFT's own: values, gradients, and that it steps aside where it isn't valid."""

import copy

import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, set_seed

from recipes.common import fast_lora

IDS = torch.randint(3, 400, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    """nn.Linear without bias, or GPT-2's Conv1D with one; B away from zero."""
    return make(request.param)


def make(kind, **options):
    set_seed(0)
    config = tiny_config(kind)
    config.initializer_range = 0.1
    config.update({name: 0.0 for name in config.to_dict() if "dropout" in name or name.endswith("pdrop")})
    auto_class = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}.get(kind, AutoModelForCausalLM)
    model = get_peft_model(auto_class.from_config(config), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **options)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def inputs(model):
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {})


def run(model, dtype=None):
    """(logits, gradients by name)"""
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(**inputs(model)).logits
    logits.float().pow(2).mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fused(model, monkeypatch) -> int:
    """How many layers of a forward pass run the fused function."""
    calls, apply = [], fast_lora._Fused.apply
    with monkeypatch.context() as patch:
        patch.setattr(fast_lora._Fused, "apply", lambda *args: calls.append(1) or apply(*args))
        model(**inputs(model))
    return len(calls)


def test_values_and_gradients_are_those_of_peft_in_fp32(model, monkeypatch):
    logits, gradients = run(model)
    fast_lora.speed_up(model)
    assert fused(model, monkeypatch) == len(layers(model)) > 0
    fast_logits, fast_gradients = run(model)
    torch.testing.assert_close(fast_logits, logits, rtol=1e-5, atol=1e-6)
    assert fast_gradients.keys() == gradients.keys() and all("lora_" in name for name in gradients)
    torch.testing.assert_close(fast_gradients, gradients, rtol=1e-4, atol=1e-7)
    for layer in layers(model):
        layer.scaling["default"] *= 1.01
    assert not torch.allclose(run(model)[0], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_on_every_kind_of_model_a_variant_is_that_of_peft(kind, options, monkeypatch):
    """rsLoRA is another scale, so the fused function is its own; DoRA is another formula, and left to PEFT."""
    model = make(kind, **options)
    logits, gradients = run(model)
    fast_lora.speed_up(model)
    assert fused(model, monkeypatch) == (0 if "use_dora" in options else len(layers(model)))
    fast_logits, fast_gradients = run(model)
    torch.testing.assert_close(fast_logits, logits, rtol=1e-5, atol=1e-5)
    assert fast_gradients.keys() == gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("magnitude" in name for name in gradients) == ("use_dora" in options)
    torch.testing.assert_close(fast_gradients, gradients, rtol=1e-3, atol=1e-6)
    for layer in layers(model):
        layer.scaling["default"] *= 1.01
    assert not torch.allclose(run(model)[0], logits, rtol=1e-5, atol=1e-5)


def test_values_and_gradients_under_autocast_are_as_near_to_fp32_as_those_of_peft(model):
    exact_logits, exact = run(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.data = parameter.data.bfloat16()
    logits, gradients = run(model, torch.bfloat16)
    fast_lora.speed_up(model)
    fast_logits, fast_gradients = run(model, torch.bfloat16)
    assert fast_logits.dtype == logits.dtype and {g.dtype for g in fast_gradients.values()} == {torch.float32}
    assert (fast_logits - exact_logits).norm() < 1.2 * (logits - exact_logits).norm()

    def error(found):
        return sum((found[name] - exact[name]).pow(2).sum() for name in exact).sqrt()

    assert error(fast_gradients) < 1.2 * error(gradients)
    assert error({name: 1.05 * gradient for name, gradient in gradients.items()}) > 1.2 * error(gradients)


def test_a_new_update_is_the_identity():
    set_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config("llama"))
    expected = base(input_ids=IDS).logits
    model = fast_lora.speed_up(get_peft_model(base, LoraConfig(target_modules="all-linear")))
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_disabling_merging_and_copying_stay_those_of_peft(model, monkeypatch):
    own = copy.deepcopy(model)
    fast_lora.speed_up(model)
    assert list(model.state_dict()) == list(own.state_dict())
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(own).keys()
    tuned = model(input_ids=IDS).logits
    with model.disable_adapter(), own.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, own(input_ids=IDS).logits)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(twin):
            layer.lora_B["default"].weight.zero_()
    assert torch.equal(model(input_ids=IDS).logits, tuned)
    assert not torch.allclose(twin(input_ids=IDS).logits, tuned, atol=1e-3)
    model.merge_adapter()
    assert fused(model, monkeypatch) == 0
    torch.testing.assert_close(model(input_ids=IDS).logits, tuned, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert fused(model, monkeypatch) == len(layers(model))
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}], ids=str)
def test_it_steps_aside_and_says_so(options, monkeypatch, capsys):
    kind = "gpt2" if "bias" in options else "llama"  # Llama's matrices have no bias of their own
    model = make(kind, **options)
    set_seed(7)
    expected = model(input_ids=IDS).logits
    fast_lora.speed_up(model)
    count = len(layers(model))
    assert f"note: {count} of {count} LoRA layers run PEFT's own, slower forward" in capsys.readouterr().out
    assert fused(model, monkeypatch) == 0
    set_seed(7)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    if "lora_dropout" in options:  # no dropout in evaluation
        assert fused(model.eval(), monkeypatch) == count


def test_it_says_nothing_where_all_layers_are_fused(capsys):
    fast_lora.speed_up(make("llama"))
    assert capsys.readouterr().out == ""


def test_two_active_updates_are_summed_by_peft(monkeypatch):
    model = fast_lora.speed_up(make("llama"))
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    one = model(input_ids=IDS).logits
    model.base_model.set_adapter(["default", "second"])
    assert fused(model, monkeypatch) == 0
    assert not torch.allclose(model(input_ids=IDS).logits, one, atol=1e-3)
    model.set_adapter("second")
    assert fused(model, monkeypatch) == len(layers(model))
