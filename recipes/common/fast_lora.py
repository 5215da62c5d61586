"""LoRA's forward and backward as one function, for the layers on which PEFT's own makes detours.

    y = x Wᵀ + bias + s (x Aᵀ) Bᵀ        x: (..., inputs), W: (outputs, inputs) frozen, A: (rank, inputs), B: (outputs, rank), s: scaling

PEFT casts the input to the type of A and, under autocast, back again, and makes a tensor as large as the output for each of its steps.
Here the update is added in place to the product with the frozen matrix, forward and backward, and of the activations only x and x Aᵀ are
kept. The result is PEFT's, to rounding. Parameters, their names, saving, merging and `disable_adapter` stay PEFT's.
"""

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


def speed_up(model):
    """Let the LoRA layers of the PEFT model `model` run the fused forward wherever it is valid; returns `model`.

    Prints how many layers can't, if any, as they are the slower ones.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    slow = 0
    for layer in layers:
        if type(layer) is Linear and type(layer.get_base_layer()) in (nn.Linear, Conv1D):
            layer.__class__ = FusedLinear
            slow += not _plain(layer)
        else:
            slow += 1
    if slow:
        print(f"note: {slow} of {len(layers)} LoRA layers run PEFT's own, slower forward: dropout, a variant such as DoRA, or a layer "
              "that is no plain matrix")
    return model


class FusedLinear(Linear):
    """PEFT's LoRA layer with the fused forward: x (..., inputs) -> (..., outputs). `speed_up` makes a layer one by changing its class:
    with a forward of each instance's own, torch.compile would compile every block anew."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or self.disable_adapters or self.merged or not _plain(self):
            return super().forward(x, *args, **kwargs)
        [name] = self.active_adapters
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        elif x.dtype == base.weight.dtype == a.dtype:
            dtype = x.dtype
        else:  # PEFT adds in the wider type
            return super().forward(x)
        weight = base.weight if isinstance(base, Conv1D) else base.weight.t()
        return _Fused.apply(x.to(dtype), weight.to(dtype), None if base.bias is None else base.bias.to(dtype), a, b, self.scaling[name])


def _plain(layer) -> bool:
    """Whether the formula above is all that `layer` computes, and whether A and B are all that it trains."""
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or names[0] in layer.lora_variant:
        return False
    dropout, base, up = layer.lora_dropout[names[0]], layer.base_layer, layer.lora_B[names[0]]
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    hooked = base._forward_hooks or base._forward_pre_hooks
    return frozen and not hooked and up.bias is None and (isinstance(dropout, nn.Identity) or not layer.training)


class _Fused(torch.autograd.Function):
    """x: (..., inputs), weight: (inputs, outputs) frozen, bias: (outputs,) or None frozen, all of one type; a: (rank, inputs) and
    b: (outputs, rank) of any type, in which their gradients come back."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        flat = x.reshape(-1, x.shape[-1])
        a_, b_ = a.to(x.dtype), b.to(x.dtype)
        reduced = flat @ a_.t()
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        y.addmm_(reduced, b_.t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, reduced, a_, b_)
        ctx.scaling, ctx.shape, ctx.types = scaling, x.shape, (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        flat, weight, reduced, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        to_reduced = (gradient @ b).mul_(ctx.scaling)
        to_a = (to_reduced.t() @ flat).to(ctx.types[0]) if ctx.needs_input_grad[3] else None
        to_b = (gradient.t() @ reduced).mul_(ctx.scaling).to(ctx.types[1]) if ctx.needs_input_grad[4] else None
        to_x = (gradient @ weight.t()).addmm_(to_reduced, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_a, to_b, None
