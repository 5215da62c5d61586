"""What a model's output is compared with: one function a kind of model, all with the same result.

A loss function takes `(model, inputs)`, runs the model once and returns a list of `Part`: the logits of everything that is supervised and
the right answers. `Part.nll` is the loss of each item. So whatever is done to a loss (label smoothing, R-Drop, ensembles) is written once
for all tasks, and whatever a task supervises is said here and nowhere else.
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel

from recipes.common.chat import IGNORE
from recipes.common.cross_entropy import cross_entropy
from recipes.common.errors import UserError

UNLIKE = "the runs were asked for different tokens of the same row, so their probabilities can't be averaged: evaluate each alone"


@dataclass
class Part:
    """n supervised items of a batch, and what the model makes of them."""

    logits: torch.Tensor  # (n, classes)
    targets: torch.Tensor  # (n,) the right class, IGNORE for none; or (n, classes) of 0.0 and 1.0, each class a yes or no of its own
    where: torch.Tensor  # where the items stand: true n times in (batch, positions), row by row
    weights: torch.Tensor | None = None  # (n,) what an item counts; None: 1
    aside: bool = False  # trained on beside the task's items, which alone make up the dev loss

    def nll(self, label_smoothing: float = 0.0) -> torch.Tensor:
        """(n,) negative log-likelihood in nats, fp32, weighted; of yes-or-no classes, the sum over them.

        Label smoothing is the Trainer's: that share of the loss is the mean over the classes.
        """
        if self.targets.dim() == 2:
            nll = F.binary_cross_entropy_with_logits(self.logits.float(), self.targets, reduction="none").sum(1)
        else:
            nll = cross_entropy(self.logits, self.targets, label_smoothing)
        return nll if self.weights is None else nll * self.weights

    def log_probabilities(self) -> torch.Tensor:
        """(n, classes) in fp32; of yes-or-no classes, of the yes."""
        return F.logsigmoid(self.logits.float()) if self.targets.dim() == 2 else self.logits.float().log_softmax(-1)


def next_token(model, inputs) -> list[Part]:
    """Causal language models: position t is asked for token t + 1. `inputs`: input_ids, attention_mask, labels, each (batch, length)."""
    labels = inputs["labels"][:, 1:]
    keep = labels != IGNORE
    # The last position predicts nothing. The pad at the end makes the mask as long as what the head sees.
    logits = _logits_at(F.pad(keep, (0, 1)), model, **_to_read(inputs), use_cache=False)
    return [Part(logits, labels[keep], keep)]


def same_token(model, inputs) -> list[Part]:
    """Models that are asked for the label at its own position: masked language models, and encoder-decoders, whose decoder reads the
    labels shifted by one. `labels` (batch, length of what is asked for)."""
    labels = inputs["labels"]
    keep = labels != IGNORE
    extra = {}
    if network(model).config.is_encoder_decoder:
        extra = {"decoder_input_ids": network(model).prepare_decoder_input_ids_from_labels(labels=labels), "use_cache": False}
    return [Part(_logits_at(keep, model, **_to_read(inputs), **extra), labels[keep], keep)]


def masked_and_next_sentence(model, inputs) -> list[Part]:
    """BERT's two tasks at once: the masked tokens, `labels` (batch, length), and whether the second text of a row follows the first,
    `next_sentence` (batch,), 0 if it does, 1 if not, IGNORE for a row of one text.

    BERT's loss is the sum of both means (Devlin et al., 2018, section 3.1). Here the loss is a sum over items divided by the number of
    masked tokens, so a row's answer counts as many items as a row has masked tokens on average; over several micro-batches, the second
    mean is weighted by their masked tokens.
    """
    labels, follows = inputs["labels"], inputs["next_sentence"]
    keep = labels != IGNORE
    with only_positions(network(model).get_output_embeddings(), keep):
        out = model(**_to_read(inputs))
    pairs = (follows != IGNORE).sum().clamp(min=1)
    weights = (keep.sum() / pairs).expand(len(follows))
    rows = torch.ones(len(follows), 1, dtype=torch.bool, device=follows.device)
    return [Part(out.prediction_logits, labels[keep], keep), Part(out.seq_relationship_logits, follows, rows, weights, aside=True)]


def words(model, inputs) -> list[Part]:
    """Token classification: a label at one token of each word. `labels` (batch, length)."""
    keep = inputs["labels"] != IGNORE
    return [Part(model(**_to_read(inputs)).logits[keep], inputs["labels"][keep], keep)]


def rows(model, inputs) -> list[Part]:
    """Sequence classification. `labels` (batch,), IGNORE for a row without a class, or (batch, classes) of 0.0 and 1.0; `weights` (batch,)
    if the rows weigh differently."""
    labels = inputs["labels"]
    logits = model(**_to_read(inputs)).logits
    return [Part(logits, labels, torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device), inputs.get("weights"))]


class Ensemble:
    """Several models of one task that answer together, by the mean of their probabilities."""

    def __init__(self, members: list):
        self.members, self.device, self.dtype = members, members[0].device, members[0].dtype


def members(model) -> list:
    """The models that `model` is made of: itself, or those of an ensemble."""
    return model.members if isinstance(model, Ensemble) else [model]


def average(passes: list[list[Part]], from_end: bool = False) -> list[Part]:
    """The parts of several models on the same rows as one: logits of the mean probability.

    A model that reads less of a row than another has fewer of its items: the last ones with `from_end`, else the first ones. An item's mean
    is over the models that have it. Raises `UserError` where what is asked of the models differs.
    """
    joined = []
    for parts in zip(*passes, strict=True):
        first = parts[0]
        if not all(torch.equal(part.where, first.where) for part in parts):
            joined.append(_average_of_unequal(parts, from_end))
            continue
        if not all(torch.equal(part.targets, first.targets) for part in parts):
            raise UserError(UNLIKE)
        if first.targets.dim() == 2:
            logits = torch.stack([part.logits.float().sigmoid() for part in parts]).mean(0).logit(eps=1e-7)
        else:
            logits = torch.stack([part.log_probabilities() for part in parts]).logsumexp(0) - math.log(len(parts))
        joined.append(Part(logits, first.targets, first.where, first.weights, first.aside))
    return joined


def _average_of_unequal(parts: tuple[Part, ...], from_end: bool) -> Part:
    """`average` of parts whose rows have other numbers of items, or the same at other positions."""
    counts = [part.where.sum(1) for part in parts]
    most = torch.stack(counts).max(0).values
    numbers = torch.arange(int(most.max()), device=most.device)
    where = numbers < most[:, None]  # item k of a row, wherever it stood
    logits = parts[0].logits.new_full((int(most.sum()), parts[0].logits.shape[1]), -math.inf, dtype=torch.float32)
    targets, models = parts[0].targets.new_empty(len(logits)), parts[0].targets.new_zeros(len(logits))
    for part, own in zip(parts, counts, strict=True):
        has = (where & (numbers >= (most - own)[:, None] if from_end else numbers < own[:, None]))[where]
        met = models[has] > 0
        if not torch.equal(targets[has][met], part.targets[met]):
            raise UserError(UNLIKE)
        logits[has] = torch.logaddexp(logits[has], part.log_probabilities())
        targets[has] = part.targets
        models += has
    return Part(logits - models.log()[:, None], targets, where)


def network(model):
    """The transformers model inside `model`, without the wrappers of PEFT and of a group of processes."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _logits_at(keep: torch.Tensor, model, **inputs) -> torch.Tensor:
    """(keep.sum(), vocabulary): the logits at the positions `keep`, (batch, length), and no others computed if the model allows it."""
    head = network(model).get_output_embeddings()
    with only_positions(head, keep) if head is not None else contextlib.nullcontext():
        logits = model(**inputs).logits
    if logits.dim() == 2:
        return logits
    # There is no such module, or the model multiplies by its weights without calling it.
    _say_once(f"note: the head of {type(network(model)).__name__} can't be told which positions are trained on, so it computes the logits "
              "of all: this takes more time and memory")
    return logits[keep]


@functools.cache
def _say_once(sentence: str) -> None:
    print(sentence)


@contextlib.contextmanager
def only_positions(head, keep: torch.Tensor):
    """Within this context `head` sees only the hidden states at `keep`, (batch, length): those that predict a supervised token.

    The model's logits become (keep.sum(), vocabulary); the loss over them equals the one over all logits, whose other rows it would
    have ignored.
    """
    def select(module, args):
        hidden = args[0]
        if hidden.shape[:2] != keep.shape:
            raise ValueError(f"the head sees {hidden.shape[1]} positions for {keep.shape[1]} tokens: can't tell them apart")
        return (hidden[keep],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def row_sums(parts: list[Part], text_bytes: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, 2): each row's sum of negative log-likelihoods in nats, and its number of items (of yes-or-no classes, each is one).

    All parts stand in the same rows; those that are `aside` don't count. Where the task says how many bytes of text a row's items stand
    for, `text_bytes` (batch,) are the third column.
    """
    sums = 0
    for part in parts:
        if part.aside:
            continue
        per_item = torch.zeros(*part.where.shape, 2, dtype=torch.float64, device=part.where.device)
        yes_or_no = part.targets.dim() == 2
        items = torch.full_like(part.targets[:, 0], part.targets.shape[1]) if yes_or_no else part.targets != IGNORE
        per_item[part.where] = torch.stack([part.nll().double(), items.double()], dim=-1)
        sums = sums + per_item.sum(1)
    return sums if text_bytes is None else torch.cat([sums, text_bytes.double()[:, None]], 1)


def _to_read(inputs) -> dict:
    """What a model reads of a batch: all but the answers and what is counted."""
    return {name: tensor for name, tensor in inputs.items() if name not in ("labels", "weights", "next_sentence", "bytes")}
