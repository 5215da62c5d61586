"""Against over-fitting: layer-wise learning rates, dropout, adversarial embeddings, R-Drop. Each works with every method and task.

`RecipeTrainer` calls each of these in one place; nothing here knows a recipe or a task.
"""

import re
from collections.abc import Callable

import torch

from recipes.common.chat import IGNORE
from recipes.common.errors import UserError
from recipes.common.losses import Part

# What the configs of transformers' models call their dropout probabilities.
DROPOUTS = ("attention_dropout", "hidden_dropout", "activation_dropout", "dropout", "dropout_rate", "hidden_dropout_prob",
            "attention_probs_dropout_prob", "classifier_dropout", "seq_classif_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
_BLOCK = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"\b(?:wte|wpe|shared|\w*embed\w*)\b")


def dropouts(config) -> dict[str, float]:
    """The dropout probabilities that a model's config has; one that is not set counts as 0."""
    return {name: getattr(config, name) or 0.0 for name in DROPOUTS if hasattr(config, name)}


def decay_by_layer(optimizer, named_parameters, decay: float) -> None:
    """Divide the optimizer's groups by depth: each block learns `decay` times as fast as the one above it.

    The head, the final norm and everything that belongs to no block (a prefix) keep the full rate; the embeddings come last (Howard and
    Ruder, 2018, arXiv:1801.06146; as in ELECTRA's fine-tuning). Call it once, before the schedule is made. The fastest group comes first,
    as the first one's rate is what the Trainer logs. Raises `UserError` where nothing would learn slower.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    blocks = [int(found[1]) for name in names.values() if (found := _BLOCK.search(name))]
    top = max(blocks, default=-1) + 2

    def depth(parameter) -> int:
        name = names[id(parameter)]
        if found := _BLOCK.search(name):
            return int(found[1]) + 1
        return 0 if _EMBEDDING.search(name) and "prompt_encoder" not in name else top

    if all(depth(p) == top for group in optimizer.param_groups for p in group["params"]):
        raise UserError("--layer_lr_decay: nothing that is trained here belongs to a block of the model, so all of it would learn alike: "
                        "leave it out")
    groups = []
    for group in optimizer.param_groups:
        for level in sorted({depth(p) for p in group["params"]}):
            groups.append({**group, "params": [p for p in group["params"] if depth(p) == level],
                           "lr": group["lr"] * decay ** (top - level)})
    optimizer.param_groups = sorted(groups, key=lambda group: -group["lr"])


def divergence(one: list[Part], other: list[Part]) -> torch.Tensor:
    """The sum over all items of the mean of KL(p|q) and KL(q|p): R-Drop's second term (Liang et al., 2021, arXiv:2106.14448).

    `one` and `other` are two passes over the same batch, with different dropout. As in the loss, an item counts by its weight, and one
    without an answer not at all.
    """
    total = 0
    for p, q in zip(one, other, strict=True):
        # KL(p|q) + KL(q|p) = sum (p - q)(log p - log q); of a yes or no, both outcomes of it come to (p - q)(logit p - logit q).
        if p.targets.dim() == 2:
            terms = (p.logits.float().sigmoid() - q.logits.float().sigmoid()) * (p.logits.float() - q.logits.float())
        else:
            log_p, log_q = p.log_probabilities(), q.log_probabilities()
            terms = (log_p.exp() - log_q.exp()) * (log_p - log_q) * (p.targets != IGNORE)[:, None]
        total = total + (terms if p.weights is None else terms * p.weights[:, None]).sum() / 2
    return total


class Adversary:
    """Moves what the embedding layer gives, within `epsilon` times its own length, to where the loss is highest.

    `steps` 1 is FGM (Miyato et al., 2017, arXiv:1605.07725), more is PGD (Madry et al., 2018, arXiv:1706.06083). The outputs are moved, not
    the weights, so frozen embeddings stay as they are and padding is left alone. Lengths are L2 norms over a row's tokens.
    """

    def __init__(self, embedding: torch.nn.Module, epsilon: float, steps: int):
        self.epsilon, self.steps, self.delta = epsilon, steps, None
        embedding.register_forward_hook(self._move)

    def _move(self, module, args, output):
        if self.delta is None:
            return output
        if self.delta.numel() == 0:  # the clean pass: nothing is moved, but the gradient is asked for
            self.clean, self.delta = output.detach(), torch.zeros_like(output, dtype=torch.float32).requires_grad_()
        return output + self.delta.to(output.dtype)

    def train(self, clean_pass: Callable, loss: Callable, mask: torch.Tensor):
        """Run `clean_pass` (forward and backward), then the same on moved embeddings, so that the gradients of both add up.

        `loss` computes the loss alone, for the further steps of PGD. `mask` (batch, length) is 1 where a token is real. Returns what the
        clean pass returned.
        """
        self.delta = torch.empty(0)
        result = clean_pass()
        gradient, mask = self.delta.grad, mask[..., None]
        radius = self.epsilon * _length(self.clean * mask)
        moved = torch.zeros_like(gradient)
        for step in range(self.steps):
            direction = gradient * mask
            moved = moved + radius / self.steps * (1.5 if self.steps > 1 else 1.0) * direction / _length(direction)
            moved = moved * (radius / _length(moved)).clamp(max=1.0)
            self.delta = moved.detach().requires_grad_()
            if step + 1 < self.steps:
                gradient, = torch.autograd.grad(loss(), self.delta)
        clean_pass()
        self.delta = None
        return result


def _length(rows: torch.Tensor) -> torch.Tensor:
    """(batch, 1, 1) L2 norm of each row, never 0."""
    return rows.float().flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
