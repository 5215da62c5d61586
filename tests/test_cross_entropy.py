"""Cross-entropy by chunks against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from recipes.common import cross_entropy as module
from recipes.common.chat import IGNORE
from recipes.common.cross_entropy import cross_entropy

ROWS, CLASSES = 23, 37


def items(dtype=torch.float32, seed=0):
    """(logits, targets with some IGNORE, weights of the items in the loss)"""
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(ROWS, CLASSES, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    targets[[0, 7]] = IGNORE
    return logits, targets, torch.rand(ROWS, generator=generator)


def reference(logits, targets, smoothing):
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)


def compare(function, dtype, smoothing):
    """Values and gradients of `function` must be those of PyTorch, to the rounding of `dtype`."""
    logits, targets, weights = items(dtype)
    expected, found = reference(logits, targets, smoothing), function(logits, targets, smoothing)
    assert found.dtype == torch.float32 and found[targets == IGNORE].eq(0).all()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    [wanted] = torch.autograd.grad((expected * weights).sum(), logits)
    [gradient] = torch.autograd.grad((found * weights).sum(), logits)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, wanted, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 5, ROWS, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_equals_pytorch_s(dtype, smoothing, rows, monkeypatch):
    monkeypatch.setitem(module.CHUNK, "cpu", rows * CLASSES)
    compare(cross_entropy, dtype, smoothing)


@pytest.mark.parametrize("wrong", [lambda z, t, s: cross_entropy(z, t, s + 0.01), lambda z, t, s: cross_entropy(z, t.clamp(min=0), s),
                                   lambda z, t, s: cross_entropy(z, t, s) + z.float().mean(1) * 0.001])
def test_another_loss_is_told_apart(wrong):
    with pytest.raises(AssertionError):
        compare(wrong, torch.float32, 0.1)


def test_large_and_infinite_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, float("-inf"), 1.0]], requires_grad=True)
    targets = torch.tensor([1, 2])
    expected, found = reference(logits, targets, 0.0), cross_entropy(logits, targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), logits), torch.autograd.grad(expected.sum(), logits))


def test_no_items():
    logits = torch.zeros(0, CLASSES, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long)).sum()
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, CLASSES)


def test_no_more_than_a_chunk_is_in_fp32(monkeypatch):
    monkeypatch.setitem(module.CHUNK, "cpu", 5 * CLASSES)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest.append(out.numel())
            return out

    for function, fits in (cross_entropy, True), (reference, False):
        logits, targets, _ = items(torch.bfloat16)
        largest.clear()
        with Watch():
            function(logits, targets, 0.1).sum().backward()
        assert (max(largest) <= 5 * CLASSES) is fits
