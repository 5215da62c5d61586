"""Attention in blocks of queries: the same as the formula, whatever the mask, the groups and the model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertConfig, BertModel, Gemma2Config, MistralConfig

from recipes.common import cpu_attention


class Layer:
    is_causal = True


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 4)


def tensors(heads=4, groups=2, queries=11, keys=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    make = lambda n, length: torch.randn(2, n, length, 8, generator=generator, dtype=dtype, requires_grad=True)  # noqa: E731
    return make(heads, queries), make(groups, keys), make(groups, keys)


def formula(query, key, value, mask, scaling):
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


def right_padded():
    mask = causal(11, 11).repeat(2, 1, 1, 1)
    mask[0, :, :, 9:] = False
    return mask


CASES = {"causal": (None, None, 11), "right padding": (right_padded(), None, 11), "after a prefix": (causal(11, 14), None, 14),
         "a window": (causal(11, 11) & causal(11, 11).flip(2, 3).roll(3, 3).tril(), None, 11),
         "both directions": (None, False, 11), "other lengths": (None, False, 7)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_result_and_gradients_are_those_of_the_formula(case, groups):
    mask, is_causal, keys = CASES[case]
    if case == "a window":
        mask = mask | torch.eye(11, dtype=torch.bool)  # each sees at least itself
    q, k, v = inputs = tensors(groups=groups, keys=keys)
    out, _ = cpu_attention.attend(Layer(), q, k, v, mask, scaling=0.3, is_causal=is_causal)
    full = torch.ones(11, keys, dtype=torch.bool)[None, None]
    expected = formula(q, k, v, mask if mask is not None else full if is_causal is False else causal(11, keys), 0.3)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    for mine, right in zip(torch.autograd.grad((out * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs),
                           strict=True):
        torch.testing.assert_close(mine, right)


def test_a_broken_mask_would_show():
    q, k, v = tensors()
    out, _ = cpu_attention.attend(Layer(), q, k, v, None, scaling=0.3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(out, formula(q, k, v, torch.ones(1, 1, 11, 11, dtype=torch.bool), 0.3))


def test_what_comes_later_has_no_effect():
    q, k, v = tensors()
    first, _ = cpu_attention.attend(Layer(), q, k, v)
    k, v = (torch.cat([t[:, :, :6], torch.randn_like(t[:, :, 6:])], 2) for t in (k, v))
    second, _ = cpu_attention.attend(Layer(), q, k, v)
    assert torch.equal(first[:, :6], second[:, :6]) and not torch.equal(first[:, 6:], second[:, 6:])


def test_a_row_that_sees_nothing_gives_numbers():
    mask = causal(11, 11).repeat(2, 1, 1, 1)
    mask[0, :, :, :5] = False  # padding on the left
    q, k, v = tensors()
    out, _ = cpu_attention.attend(Layer(), q, k, v, mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0, 5:], formula(q, k, v, mask, 8 ** -0.5)[0, 5:])


def test_dropout_drops_the_same_weights_forward_and_backward():
    q, k, _ = tensors(heads=1, groups=1, queries=8, keys=8)
    v = torch.eye(8, dtype=torch.float64).expand(2, 1, 8, 8).clone().requires_grad_()  # so the result is the weights themselves
    torch.manual_seed(0)
    out, _ = cpu_attention.attend(Layer(), q, k, v, dropout=0.5)
    weights = formula(q, k, v, causal(8, 8), 8 ** -0.5)
    kept = out != 0
    torch.testing.assert_close(out, weights * kept * 2)
    assert 0.2 < kept.sum() / causal(8, 8).sum() / 2 < 0.8
    upstream = torch.randn(out.shape, dtype=out.dtype)
    for mine, right in zip(torch.autograd.grad((out * upstream).sum(), (q, k)),
                           torch.autograd.grad((weights * kept * 2 * upstream).sum(), (q, k)), strict=True):
        torch.testing.assert_close(mine, right)


def test_under_autocast_it_computes_in_bf16():
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = cpu_attention.attend(Layer(), q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), formula(q, k, v, causal(11, 11), 8 ** -0.5), atol=0.03, rtol=0.03)
    [gradient] = torch.autograd.grad(out.float().sum(), q)
    assert gradient.dtype == torch.float32


def logits_and_gradients(model, kernel, **inputs):
    model.set_attn_implementation(kernel)
    model.zero_grad()
    out = model(**inputs)
    out = out.logits if "logits" in out else out.last_hidden_state
    out[inputs["attention_mask"].bool()].pow(2).sum().backward()
    return out[inputs["attention_mask"].bool()], [p.grad.clone() for p in model.parameters() if p.grad is not None]


def batch(length=30):
    ids = torch.randint(5, 300, (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0
    return dict(input_ids=ids, attention_mask=mask)


def same(model, **inputs):
    model.double().train()
    right, expected = logits_and_gradients(model, "sdpa", **inputs)
    mine, gradients = logits_and_gradients(model, cpu_attention.NAME, **inputs)
    torch.testing.assert_close(mine, right)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_models_of_one_stack(tiny, kind):
    no_dropout = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0} if kind == "gpt2" else {}
    same(AutoModelForCausalLM.from_pretrained(tiny(kind), **no_dropout), **batch())


def test_a_model_with_a_sliding_window():
    same(AutoModelForCausalLM.from_config(MistralConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                        num_attention_heads=4, num_key_value_heads=2, sliding_window=6)), **batch())


def test_an_encoder():
    same(BertModel(BertConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                              hidden_dropout_prob=0, attention_probs_dropout_prob=0)), **batch())


def test_position_biases_are_left_to_the_other_kernel(tiny):
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny("t5"), dropout_rate=0)
    inputs = batch()
    same(model, **inputs, decoder_input_ids=inputs["input_ids"])


def test_a_model_that_caps_its_scores_keeps_saying_so():
    model = AutoModelForCausalLM.from_config(Gemma2Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                          num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    model.set_attn_implementation(cpu_attention.NAME)
    with pytest.raises(ValueError, match="softcap"):
        model(**batch())


def test_generation_goes_on_from_a_cache(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    inputs = batch()
    inputs = {name: t.flip(1) for name, t in inputs.items()}  # padding on the left
    answers = []
    for kernel in ("sdpa", cpu_attention.NAME):
        model.set_attn_implementation(kernel)
        answers.append(model.generate(**inputs, max_new_tokens=12, do_sample=False))
    assert torch.equal(*answers)


def test_long_rows_go_to_the_kernel_that_keeps_no_weights(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    cpu_attention.choose(model, 100)
    assert model.config._attn_implementation == cpu_attention.NAME
    cpu_attention.choose(model, cpu_attention.TOO_LONG)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    cpu_attention.choose(model, 100)
    assert model.config._attn_implementation == "eager"
