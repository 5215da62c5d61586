"""Cross-entropy over a large vocabulary without the logits in fp32: a few rows at a time, forward and backward.

PyTorch's own makes the logits in fp32, their log-softmax and its gradient, each of (items, classes). Here the fp32 copies hold some rows
only, so few that a CPU keeps them in its cache; all that stays is the logits as they came and one number an item.
"""

import torch
from torch.autograd.function import once_differentiable

from recipes.common.chat import IGNORE

# fp32 numbers at a time: 2 MB on a CPU, 64 MB elsewhere.
CHUNK = {"cpu": 2 ** 19}
LARGE_CHUNK = 2 ** 24


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """(n,) negative log-likelihoods in nats, fp32, of `logits` (n, classes) of any float type for `targets` (n,), 0 where IGNORE.

    The same as torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing); it can be
    differentiated once.
    """
    rows = max(1, CHUNK.get(logits.device.type, LARGE_CHUNK) // logits.shape[1])
    return _CrossEntropy.apply(logits, targets, label_smoothing, rows)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, smoothing, rows):
        nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        normalizers = torch.empty_like(nll)  # log of the sum of exponentials
        for z, target, normalizer, out in _chunks(rows, logits, targets, normalizers, nll):
            z = z.float()
            torch.logsumexp(z, 1, out=normalizer)
            of_target = z.gather(1, target.clamp(min=0)[:, None])[:, 0]
            if smoothing:
                of_target = (1 - smoothing) * of_target + smoothing * z.mean(1)
            out.copy_((normalizer - of_target).masked_fill_(target == IGNORE, 0))
        ctx.save_for_backward(logits, targets, normalizers)
        ctx.smoothing, ctx.rows = smoothing, rows
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        logits, targets, normalizers = ctx.saved_tensors
        result = torch.empty_like(logits)
        weights = gradient.masked_fill(targets == IGNORE, 0)[:, None]
        for z, target, normalizer, weight, out in _chunks(ctx.rows, logits, targets, normalizers, weights, result):
            p = (z.float() - normalizer[:, None]).exp_()
            if ctx.smoothing:
                p -= ctx.smoothing / p.shape[1]
            p.scatter_add_(1, target.clamp(min=0)[:, None], torch.full_like(weight, ctx.smoothing - 1))
            out.copy_(p.mul_(weight))
        return result, None, None, None


def _chunks(rows: int, *tensors: torch.Tensor):
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
