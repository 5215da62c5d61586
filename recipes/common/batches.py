"""What is computed together: an optimizer step in micro-batches of rows of similar length, and steps of a number of tokens.

The rows of a step stay what the random order says; only how they are grouped for the forward and backward passes depends on their lengths.
As the loss is divided by the items of the whole step, the grouping changes nothing but the rounding.
"""

import inspect
from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow.compute as pc
import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler

from recipes.common.chat import IGNORE

# Tokens, padding included, that run together, and what one group more costs, in tokens (docs/benchmarks.md). On a CPU a larger group gains
# nothing but memory; elsewhere small groups leave the processor idle.
CPU_LIMIT, CPU_OVERHEAD = 640, 48
LARGE_OVERHEAD = 256
CPU_PADDING = 0.02  # share of a step's positions that may be padding; it is saved by smaller groups, which cost a CPU little
# Attention kernels that run rows of different lengths behind each other at no cost.
PACKED_BY = ("flash_attention_2", "flex_attention")
# Share of the memory of a GPU that activations may take beside weights, gradients and optimizer.
ACTIVATIONS = 0.5


def split(lengths: list[int], limit: int, overhead: int) -> list[list[int]]:
    """The indices of `lengths` in the groups that are cheapest to run, those of the longest rows first.

    A group of n rows is padded to its longest one, of l tokens, and costs `overhead` + n l tokens; n l is at most `limit`, unless n is 1.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best = [(0, 0)]  # of the first k rows in `order`: what they cost, and where their last group begins
    for end in range(1, len(order) + 1):
        longest = max(1, lengths[order[end - 1]])
        first = max(0, min(end - 1, end - limit // longest))
        best.append(min((best[start][0] + overhead + (end - start) * longest, start) for start in range(first, end)))
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups


def split_tightly(lengths: list[int], limit: int, overhead: int, padding: float) -> list[list[int]]:
    """`split`, with the overhead halved until at most the share `padding` of all positions is padding."""
    while True:
        groups = split(lengths, limit, overhead)
        positions = sum(len(group) * max(lengths[i] for i in group) for group in groups)
        if positions - sum(lengths) <= padding * positions:
            return groups
        overhead //= 2


def fill(lengths: list[int], limit: int) -> list[list[int]]:
    """The indices of `lengths`, in order, in groups of at most `limit` tokens, or of a single row: for rows that are run packed."""
    groups, tokens = [], 0
    for i, length in enumerate(lengths):
        if not groups or tokens + length > limit:
            groups.append([])
            tokens = 0
        groups[-1].append(i)
        tokens += length
    return groups


def pack(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of a batch for next-token prediction behind each other as one, without its padding: input_ids, position_ids and labels, each
    (1, tokens).

    Positions begin anew with each row. That is how transformers tells the rows apart where there is no attention mask, so that no token
    sees another row (masking_utils.find_packed_sequence_indices). The first token of a row is predicted by nothing.
    """
    real = batch["attention_mask"].bool()
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORE
    positions = torch.arange(real.shape[1], device=real.device).expand_as(real)
    return {name: tensor[real][None] for name, tensor in (("input_ids", batch["input_ids"]), ("position_ids", positions),
                                                          ("labels", labels))}


def packs(network) -> bool:
    """Whether rows of the transformers model `network` are best run packed: its attention kernel skips what lies between them."""
    return network.config._attn_implementation in PACKED_BY and "position_ids" in inspect.signature(network.forward).parameters


def lengths(features, texts: tuple[str, ...]) -> list[int]:
    """Tokens of each row of a dataset of features, none of which is read, in the columns `texts` (tasks.Task) together."""
    table = features.with_format("arrow")[:]
    return sum(pc.list_value_length(table[name]).to_numpy() for name in texts).tolist()


def collate(rows: list[dict], one: Callable, group: Callable | None, texts: tuple[str, ...]) -> list[dict[str, torch.Tensor]]:
    """The batches that `rows` are run in, each made by the task's collator `one`, in the groups of `group(lengths)`; None: all together."""
    if group is None:
        return [one(rows)]
    return [one([rows[i] for i in indices]) for indices in group([sum(len(row[name]) for name in texts) for row in rows])]


def real(batch: dict[str, torch.Tensor], texts: tuple[str, ...]) -> torch.Tensor:
    """Which positions of a batch's columns `texts`, one column after the other, are tokens and no padding: (positions,), of type bool."""
    return torch.cat([(batch["attention_mask"] == 1 if name == "input_ids" else batch[name] != IGNORE).flatten() for name in texts])


def grouping(model, bf16: bool, limit: int, packed: bool = False) -> Callable[[list[int]], list[list[int]]]:
    """How to group rows, by their lengths, on the hardware that `model` is on; `limit` tokens together, or 0 for what suits it."""
    if packed:
        return partial(fill, limit=limit or _fitting_tokens(model, bf16))
    if model.device.type == "cpu":
        return partial(split_tightly, limit=limit or CPU_LIMIT, overhead=CPU_OVERHEAD, padding=CPU_PADDING)
    return partial(split, limit=limit or _fitting_tokens(model, bf16), overhead=LARGE_OVERHEAD)


def _fitting_tokens(model, bf16: bool) -> int:
    """An estimate of the tokens whose activations the memory of a GPU holds, from the model's size.

    A layer keeps about 34 bytes per token and unit of width for the backward pass in 16 bits (Korthikanti et al., 2022, arXiv:2205.05198,
    without the attention scores, which a fused kernel does not keep), and the loss three numbers per token and word of the vocabulary.
    Weights, gradients and Adam's moments take 16 bytes where trained, and what their type says where frozen.
    """
    if model.device.type != "cuda":
        return 8 * 1024
    config = model.config.get_text_config()
    weights = sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in model.parameters())
    free = ACTIVATIONS * (torch.cuda.get_device_properties(model.device).total_memory - weights)
    per_token = (34 * config.num_hidden_layers * config.hidden_size + 6 * config.vocab_size) * (1 if bf16 else 2)
    return max(1, int(free / per_token))


class StepsByTokens(BatchRebalanceSampler):
    """Every row once an epoch, in random order, cut into `len()` steps of about equal tokens; yields a process's rows of each step.

    The number of steps is that of all tokens by `tokens`, rounded up, so the steps hold at most about `tokens`, all processes together.
    Within a step the rows are dealt so that the processes hold about equal tokens. transformers passes an instance of its own
    BatchRebalanceSampler on as a sampler of whole batches that knows its process: that is all that is inherited.
    """

    def __init__(self, lengths: list[int], tokens: int, seed: int, shuffle: bool = True, processes: int = 1, process: int = 0):
        self.lengths, self.seed, self.shuffle, self.processes, self.process = np.asarray(lengths), seed, shuffle, processes, process
        self.steps, self.epoch = steps_of(lengths, tokens, processes), 0

    def __len__(self):
        return self.steps

    def __iter__(self):
        rows = np.arange(len(self.lengths))
        if self.shuffle:
            rows = np.random.default_rng((self.seed, self.epoch)).permutation(rows)
        lengths = self.lengths[rows]
        middles = lengths.cumsum() - lengths / 2  # a row belongs to the step that its middle falls into
        start = 0
        for step in range(1, self.steps + 1):
            end = int(np.searchsorted(middles, lengths.sum() * step / self.steps, side="right"))
            # Each step needs a row for every process, this one as well as those to come.
            end = max(start + self.processes, min(end, len(rows) - (self.steps - step) * self.processes))
            yield self._share(rows[start:end].tolist())
            start = end

    def _share(self, rows: list[int]) -> list[int]:
        shares, tokens = [[] for _ in range(self.processes)], [0] * self.processes
        for row in sorted(rows, key=lambda row: -self.lengths[row]):
            least = tokens.index(min(tokens))
            shares[least].append(row)
            tokens[least] += int(self.lengths[row])
        return shares[self.process]


def steps_of(lengths: list[int], tokens: int, processes: int = 1) -> int:
    """Optimizer steps in which `StepsByTokens` takes rows of these lengths."""
    return max(1, min(-(-sum(lengths) // tokens), len(lengths) // processes))
