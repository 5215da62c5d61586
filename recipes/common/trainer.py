"""The Trainer of all recipes: transformers' own, with an exact and cheap loss for language models, and exact resume for PEFT.

Four things differ, each in one place:

- `compute_loss` projects to the vocabulary only where a token is trained on (the logits are the largest tensor of a step);
- `choose_attention` takes the faster attention kernel for the batch at hand;
- `prediction_step` hands on two numbers a row in place of its logits, so that the dev loss is a mean over tokens, exactly;
- `_save` and `_load_*` keep a PEFT method's trained parameters as they are, where PEFT's own files may hold only what they amount to.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, Trainer

from recipes.common.chat import IGNORE, pad
from recipes.common.errors import UserError

TRAINED = "trained_parameters.safetensors"


class RecipeTrainer(Trainer):
    """`transformers.Trainer` for models with a language-model head, trained on `labels` with `IGNORE` where there is no loss."""

    def __init__(self, *, model, args, callbacks, early_stopping_patience: int = 0, **kwargs):
        callbacks = list(callbacks)
        if early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience))
        if args.bf16:
            _hold_frozen_in_bf16(model)
        super().__init__(model=model, args=args, callbacks=callbacks, compute_metrics=token_metrics, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole step, for any model
        self._loss_shifts_labels = True
        self.label_names = ["labels"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy over the supervised tokens of the optimizer step, micro-batches and processes together."""
        nll, _ = self._token_losses(model, inputs, self.args.label_smoothing_factor)
        if num_items_in_batch is None:
            num_items_in_batch = nll.numel()
        loss = nll.sum() / num_items_in_batch
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; num_items_in_batch counts all processes
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(None, sums, sums): `sums` is (batch, 2), a row's negative log-likelihood in nats and its number of tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            nll, keep = self._token_losses(model, inputs)
        sums = row_sums(nll, keep)
        return None, sums, sums

    def _token_losses(self, model, inputs, label_smoothing=0.0):
        network = self.accelerator.unwrap_model(model)
        choose_attention(network, inputs["input_ids"].shape[1])
        return token_losses(model, inputs, network.get_output_embeddings(), label_smoothing)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel) and Path(output_dir or "").name.startswith("checkpoint-"):
            save_file(trained_state(self.model), Path(output_dir) / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _check_same_kind(resume_from_checkpoint, self.model)
        if not self._load_trained(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_trained(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_trained(self, checkpoint) -> bool:
        # A prefix behind a projection is saved by PEFT as the projection's result: right for use, useless to train on.
        if not isinstance(self.model, PeftModel):
            return False
        try:
            state = load_file(Path(checkpoint) / TRAINED)
        except SafetensorError as error:
            raise UserError(f"{checkpoint} is damaged ({error}): resume from another checkpoint by naming its folder") from error
        own = trained_state(self.model)
        if {name: p.shape for name, p in state.items()} != {name: p.shape for name, p in own.items()}:
            raise UserError(f"{checkpoint} was written by another method or with other settings: resume with the same flags")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        return True


def trained_state(model) -> dict[str, torch.Tensor]:
    """The parameters that are trained, by name, sharing memory with the model."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _check_same_kind(checkpoint, model) -> None:
    """Raise `UserError` if a PEFT method is to resume from a whole model's checkpoint, or the other way round."""
    if (Path(checkpoint) / TRAINED).is_file() != isinstance(model, PeftModel):
        raise UserError(f"{checkpoint} is no checkpoint of this method: resume with the recipe and the flags that wrote it")


def token_losses(model, inputs, head, label_smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every supervised token of a batch: (nats (n,) in fp32, where they stand (batch, length - 1)).

    `inputs` are input_ids, attention_mask and labels, each (batch, length); `head` is the model's output embedding. Label smoothing
    is the Trainer's: that share of the loss is the mean over the vocabulary.
    """
    labels = inputs["labels"][:, 1:]
    keep = labels != IGNORE
    with only_positions(head, keep):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    return F.cross_entropy(logits.float(), labels[keep], reduction="none", label_smoothing=label_smoothing), keep


def choose_attention(model, length: int) -> None:
    """On a CPU, plain matrix products for short batches, PyTorch's fused kernel for long ones; the result is the same.

    The fused kernel saves memory that grows with the square of the length, which is what makes it faster from some 400 tokens on; below,
    a training step of SmolLM2-135M took it 1.2 times as long (docs/benchmarks.md).
    """
    if model.device.type != "cpu":
        return
    wanted = "eager" if length < 400 else "sdpa"
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    if {network.config._attn_implementation, wanted} == {"eager", "sdpa"}:  # leaves a kernel that the user chose alone
        network.set_attn_implementation(wanted)


@torch.inference_mode()
def dataset_losses(model, rows, pad_id: int, description: str, tokens_per_batch: int = 2048) -> np.ndarray:
    """`row_sums` of all `rows` (columns input_ids, labels), in their order, without gradients: (rows, 2)."""
    head, order = model.get_output_embeddings(), sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    sums, batch = np.zeros((len(rows), 2)), []
    for position, i in enumerate(tqdm(order, desc=description, unit="rows")):
        batch.append(i)
        following = order[position + 1: position + 2]
        if following and len(rows[following[0]]["input_ids"]) * (len(batch) + 1) <= tokens_per_batch:
            continue
        inputs = {name: tensor.to(model.device) for name, tensor in pad([rows[j] for j in batch], pad_id).items()}
        choose_attention(model, inputs["input_ids"].shape[1])
        sums[batch] = row_sums(*token_losses(model, inputs, head)).cpu().numpy()
        batch = []
    return sums


@contextlib.contextmanager
def only_positions(head, keep: torch.Tensor):
    """Within this context `head` sees only the hidden states that predict a supervised token.

    `keep` is (batch, length - 1): position t predicts token t + 1. The model's logits become (keep.sum(), vocabulary); the loss
    over them equals the one over all logits, whose other rows it would have ignored.
    """
    def select(module, args):
        hidden = args[0]
        if hidden.shape[1] != keep.shape[1] + 1:
            raise ValueError(f"the head sees {hidden.shape[1]} positions for {keep.shape[1] + 1} tokens: can't tell them apart")
        return (hidden[:, :-1][keep],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def row_sums(nll: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """(batch, 2): each row's sum of `nll`, whose entries stand where `keep` is true, and their number."""
    per_token = torch.zeros(keep.shape, dtype=torch.float64, device=keep.device)
    per_token[keep] = nll.double()
    return torch.stack([per_token.sum(1), keep.sum(1).double()], dim=1)


def token_metrics(prediction) -> dict[str, float]:
    """Mean negative log-likelihood in nats per supervised token and its exponential, from `row_sums` of all rows."""
    nll, tokens = prediction.predictions.sum(axis=0)
    loss = float(nll / tokens)
    return {"loss": loss, "perplexity": torch.tensor(loss, dtype=torch.float64).exp().item()}  # overflows to inf; NaN stays


def _hold_frozen_in_bf16(model) -> None:
    """Frozen weights need no fp32: autocast would cast them to bf16 at every use anyway. Trained ones stay as they are.

    Only below a PEFT method, which saves its own parameters alone: a whole model is saved with its frozen layers, unrounded.
    """
    if not isinstance(model, PeftModel):
        return
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
