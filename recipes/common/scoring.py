"""Rows scored by a model as they are, without writing anything: what each costs it."""

import math

import numpy as np
import torch
from tqdm.auto import tqdm

from recipes.common import cpu_attention, faults, losses, processes
from recipes.common.errors import UserError
from recipes.common.metrics import perplexity


@torch.inference_mode()
def dataset_outputs(model, task, rows, description: str, tokens_per_batch: int = 2048) -> list[tuple[np.ndarray, ...]]:
    """What `prediction_step` gives for each of `rows`, in their order and without gradients: (sums (2,), the task's own outputs ...).

    Of an ensemble, `task` is what `ensembles.task_of` makes of its members' tasks. The rows (features of the task) go through in order of
    their length, so that little is padded. Of several processes, each takes a share, and all get the whole.
    """
    own = processes.share(len(rows))
    order, out, batch = sorted(own, key=lambda i: len(rows[i]["input_ids"])), {}, []

    def run(piece):
        for member in losses.members(model):
            cpu_attention.choose(losses.network(member), piece["input_ids"].shape[1])
        parts = task.loss(model, piece)
        return losses.row_sums(parts, piece.get("bytes")), *task.outputs(parts)

    def less(fitting):
        nonlocal tokens_per_batch
        if not fitting:
            raise UserError(f"out of memory while {description.lower()} a single row: use a machine with more memory, or shorter rows")
        tokens_per_batch = fitting * inputs["input_ids"].shape[1]
        print(f"note: out of memory while {description.lower()}: from here on at most {tokens_per_batch} tokens at once")

    for position, i in enumerate(tqdm(order, desc=description, unit="rows")):
        batch.append(i)
        following = order[position + 1: position + 2]
        if following and len(rows[following[0]]["input_ids"]) * (len(batch) + 1) <= tokens_per_batch:
            continue
        inputs = {name: tensor.to(model.device) for name, tensor in task.collate([rows[j] for j in batch]).items()}
        columns = [tensor.cpu().numpy() for tensor in faults.joined(faults.in_pieces(run, inputs, None, less))]
        for j, *values in zip(batch, *columns, strict=True):
            out[j] = tuple(values)
        batch = []
    return processes.joined([out[i] for i in own])


def mean_loss(sums: np.ndarray) -> dict[str, float]:
    """Mean negative log-likelihood in nats per supervised item and its exponential, from the `sums` of all rows, (rows, 2).

    With the bytes of their text, (rows, 3), also bits per byte, which compares models whose tokens differ. NaN where no item is supervised.
    """
    nll, items, *text_bytes = sums.sum(axis=0)
    if not items:
        return dict.fromkeys(("loss", "perplexity", *["bits_per_byte"] * len(text_bytes)), math.nan)
    per_byte = {"bits_per_byte": float(nll / math.log(2) / text_bytes[0])} if text_bytes else {}
    return {"loss": float(nll / items), "perplexity": perplexity(nll, items), **per_byte}
