"""Attention for training on a CPU: blocks of queries, each against the keys that it may see, and no more.

    softmax(s Q Kᵀ + mask) V        s: scaling

Under a causal mask, half of the scores are thrown away; with the queries in blocks, most of that half is never computed. The heads that
share keys (Ainslie et al., 2023, arXiv:2305.13245) are rows of one product, so that keys and values are not repeated. The weights are kept
for the backward pass in the type of the queries, which takes memory that grows with the square of the length; PyTorch's fused kernel keeps
none and computes them again, which pays for long rows (docs/benchmarks.md).
"""

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "cpu_blocks"
BLOCK = 128  # queries
TOO_LONG = 1536  # tokens a row: the weights of SmolLM2-135M would take 0.7 GB
# Arguments that change the scores in ways of their own.
OTHERS = ("position_bias", "softcap", "s_aux")


def attend(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """An attention function of transformers: query (batch, heads, queries, size), key and value (batch, groups, keys, size), attention_mask
    None or of booleans (batch or 1, 1, queries, keys), to ((batch, queries, heads, size), None).

    What is not the formula above, and a single query, which has no blocks, goes to transformers' function for PyTorch's kernel.
    """
    causal = attention_mask is None and (module.is_causal if is_causal is None else is_causal)
    if (any(kwargs.get(name) is not None for name in OTHERS) or query.shape[2] == 1 or (causal and query.shape[2] != key.shape[2])
            or (attention_mask is not None and attention_mask.dtype != torch.bool)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Blocks.apply(query, key, value, attention_mask, causal, scaling, dropout), None


def choose(model, length: int) -> None:
    """On a CPU, attention in blocks, but for very long rows, whose weights would take too much memory.

    The result is that of PyTorch's fused kernel, to rounding. Eager attention, which some models need, stays as it is.
    """
    if model.device.type != "cpu":
        return
    wanted = NAME if length < TOO_LONG else "sdpa"
    if {model.config._attn_implementation, wanted} == {NAME, "sdpa"}:
        model.set_attn_implementation(wanted)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, causal, scaling, dropout):
        batch, heads, queries, size = query.shape
        groups, keys = key.shape[1:3]
        grouped = (query * scaling).view(batch, groups, heads // groups, queries, size)
        key, value = key.reshape(batch * groups, keys, size), value.reshape(batch * groups, keys, -1)
        out = query.new_empty(batch, queries, groups, heads // groups, value.shape[-1])
        blocks, saved = list(_blocks(queries, keys, mask, causal)), []
        with torch.autocast(query.device.type, enabled=False):
            for rows, end in blocks:
                q = grouped[:, :, :, rows].reshape(batch * groups, -1, size)
                scores = torch.bmm(q, key[:, :end].transpose(1, 2)).view(batch, heads, -1, end)
                if mask is not None:
                    scores.masked_fill_(~mask[:, :, rows, :end], torch.finfo(scores.dtype).min)
                elif causal:  # the last keys are those of the block itself
                    n = scores.shape[2]
                    later = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu_(1)
                    scores[..., end - n:].masked_fill_(later, torch.finfo(scores.dtype).min)
                weights = torch.softmax(scores, -1).view(batch * groups, -1, end)
                kept = torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout) if dropout else None
                result = torch.bmm(weights if kept is None else weights * kept, value[:, :end])
                out[:, rows] = result.view(batch, groups, heads // groups, -1, value.shape[-1]).permute(0, 3, 1, 2, 4)
                saved += [q, weights, kept]
        ctx.save_for_backward(key, value, *saved)
        ctx.shape, ctx.scaling, ctx.blocks = query.shape, scaling, blocks
        return out.view(batch, queries, heads, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        key, value, *saved = ctx.saved_tensors
        batch, heads, queries, size = ctx.shape
        groups = len(key) // batch
        gradient = gradient.view(batch, queries, groups, heads // groups, -1)
        to_query = gradient.new_empty(batch, groups, heads // groups, queries, size)
        # Added up over the blocks without rounding to 16 bits, as one product over all queries would.
        wide = torch.promote_types(key.dtype, torch.float32)
        to_key, to_value = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (key, value))
        for (rows, end), q, weights, kept in zip(ctx.blocks, saved[::3], saved[1::3], saved[2::3], strict=True):
            g = gradient[:, rows].permute(0, 2, 3, 1, 4).reshape(len(key), -1, value.shape[-1])
            to_value[:, :end] += torch.bmm((weights if kept is None else weights * kept).transpose(1, 2), g)
            to_weights = torch.bmm(g, value[:, :end].transpose(1, 2))
            if kept is not None:
                to_weights *= kept
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_query[:, :, :, rows] = torch.bmm(to_scores, key[:, :end]).view(batch, groups, heads // groups, -1, size)
            to_key[:, :end] += torch.bmm(to_scores.transpose(1, 2), q)
        to_query = to_query.mul_(ctx.scaling).view(ctx.shape)
        to_key, to_value = (t.to(key.dtype).view(batch, groups, t.shape[1], -1) for t in (to_key, to_value))
        return to_query, to_key, to_value, None, None, None, None


def _blocks(queries: int, keys: int, mask: torch.Tensor | None, causal: bool):
    """(slice of the queries, how many of the first keys they see) of each block."""
    if mask is None and not causal:
        yield slice(0, queries), keys
        return
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        if mask is None:
            yield slice(start, stop), stop
        elif queries <= BLOCK:
            yield slice(start, stop), keys
        else:
            seen = mask[:, :, start:stop].flatten(0, -2).any(0).nonzero()
            yield slice(start, stop), int(seen[-1]) + 1 if len(seen) else keys
