"""The Trainer of all recipes: transformers' own, with an exact and cheap loss for every task, and exact resume for PEFT.

Four things differ, each in one place:

- `compute_loss` takes the task's loss function (losses.py), which projects to the vocabulary only where a token is trained on (the
  logits are the largest tensor of a step);
- `choose_attention` takes the faster attention kernel for the batch at hand;
- `prediction_step` hands on two numbers a row in place of its logits, so that the dev loss is a mean over all items, exactly, and
  whatever few numbers more the task's metrics need;
- `_save` and `_load_*` keep a PEFT method's trained parameters as they are, where PEFT's own files may hold only what they amount to.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from recipes.common import losses, regularize
from recipes.common.errors import UserError
from recipes.common.metrics import perplexity

# Settings of a PEFT method that say nothing about what its weights mean.
MAY_DIFFER = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "lora_dropout", "dropout",
              "total_step", "tinit", "tfinal", "rank_pattern"}
TRAINED = "trained_parameters.safetensors"


class RecipeTrainer(Trainer):
    """`transformers.Trainer` for the loss and the metrics of a `task` (tasks.Task), with the techniques that `shared`
    (args.SharedArguments) asks for."""

    def __init__(self, *, model, args, task, shared, callbacks, **kwargs):
        callbacks = list(callbacks)
        if shared.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(shared.early_stopping_patience))
        if task.old is not None:
            callbacks.append(BeforeTraining(self))
        if args.bf16:
            _hold_frozen_in_bf16(model)
        self.task, self.shared, self.forgetting = task, shared, {}
        if shared.start_from:
            _go_on_from(Path(shared.start_from), model)
        if shared.r_drop and not _has_dropout(model):
            raise UserError("--r_drop compares passes with different dropout, and there is none here: give the model some with "
                            "--model_dropout 0.1")
        self.adversary = None
        if shared.adversarial != "none":
            reader = losses.network(model)
            if reader.config.is_encoder_decoder:  # what the encoder reads; the table that it shares with the decoder is never called
                reader = reader.get_encoder()
            self.adversary = regularize.Adversary(reader.get_input_embeddings(), shared.adversarial_epsilon,
                                                  steps=3 if shared.adversarial == "pgd" else 1)
        super().__init__(model=model, args=args, callbacks=callbacks, compute_metrics=self._metrics, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the items of the whole step, for any model
        self._loss_shifts_labels = task.loss is losses.next_token
        self.label_names = ["labels"]

    def train(self, *args, **kwargs):
        """Train; where forgetting is to be measured, the old rows are scored before and after, into `forgetting`."""
        result = super().train(*args, **kwargs)
        if self.task.old is not None:
            self.forgetting["after"] = self._scores_on_old_rows()
        return result

    def measure_before(self) -> None:
        """Score the old rows with the weights that training starts from, or find these scores in the log of the run that is resumed."""
        if logged := [entry for entry in self.state.log_history if "old_loss" in entry]:
            self.forgetting["before"] = _named_old(logged[0])
        elif self.state.global_step:
            raise UserError("the run that is resumed did not measure forgetting before its first step: leave --replay and "
                            "--measure_forgetting out, or start again")
        else:
            self.forgetting["before"] = self._scores_on_old_rows()
            self.log({f"old_{name}": value for name, value in self.forgetting["before"].items()})

    def _scores_on_old_rows(self) -> dict[str, float]:
        # predict() and not evaluate(): early stopping listens to every evaluation. It draws a random number, for a seed of the loader,
        # which must not change the training.
        with torch.random.fork_rng(devices=[]):
            scores = self.predict(self.task.old, metric_key_prefix="old").metrics
        return _named_old({name: value for name, value in scores.items() if not name.endswith(("_runtime", "_per_second", "_time"))})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the supervised items of the optimizer step, micro-batches and processes together."""
        parts = self._parts(model, inputs)
        if num_items_in_batch is None:
            num_items_in_batch = len(parts[0].targets)
        loss = self._summed(parts)
        if self.shared.r_drop:
            others = self._parts(model, inputs)
            loss = (loss + self._summed(others)) / 2 + self.shared.r_drop * regularize.divergence(parts, others)
        loss = loss / num_items_in_batch
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; num_items_in_batch counts all processes
        return (loss, None) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward; twice or more where --adversarial asks for it. Returns the loss on the rows as they are."""
        step = partial(super().training_step, model, inputs, num_items_in_batch)

        def loss():
            with self.compute_loss_context_manager():
                return self.compute_loss(self.accelerator.unwrap_model(model), self._prepare_inputs(inputs), False, num_items_in_batch)

        if self.adversary is None:
            return step()
        return self.adversary.train(step, loss, inputs["attention_mask"].to(self.args.device))

    def get_train_dataloader(self):
        """The Trainer's; of a stream, one that Accelerate does not divide again: each process reads a share of its own."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator,
                          pin_memory=self.args.dataloader_pin_memory)

    def create_optimizer(self, *args, **kwargs):
        """The Trainer's, its learning rates scaled by --layer_lr_decay."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.shared.layer_lr_decay != 1 and new:
            regularize.decay_by_layer(optimizer, self.model.named_parameters(), self.shared.layer_lr_decay)
        return optimizer

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(None, (sums, ...), labels): `sums` is (batch, 2), a row's negative log-likelihood in nats and its number of items; after it
        come the task's own outputs."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            parts = self._parts(model, inputs)
        return None, (losses.row_sums(parts), *self.task.outputs(parts)), inputs["labels"]

    def _summed(self, parts) -> torch.Tensor:
        return sum(part.nll(self.args.label_smoothing_factor).sum() for part in parts)

    def _parts(self, model, inputs) -> list[losses.Part]:
        choose_attention(losses.network(model), inputs["input_ids"].shape[1])
        return self.task.loss(model, inputs)

    def _metrics(self, prediction) -> dict[str, float]:
        sums, *outputs = prediction.predictions
        scores = mean_loss(sums)
        if not self.task.per_token:
            del scores["perplexity"]
        return scores | self.task.metrics(*outputs, prediction.label_ids)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):
            save_file(trained_state(self.model), Path(output_dir or self.args.output_dir) / TRAINED)

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
        load_trained(Path(checkpoint), self.model)
        return True


def _named_old(scores: dict) -> dict[str, float]:
    return {name.removeprefix("old_"): value for name, value in scores.items() if name.startswith("old_")}


class BeforeTraining(TrainerCallback):
    """Measures what may be forgotten as soon as the model is ready to train: scored any earlier, Accelerate would take it for one that is
    only evaluated, and several processes would each train a model of their own."""

    def __init__(self, trainer: RecipeTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.measure_before()


def trained_state(model) -> dict[str, torch.Tensor]:
    """The parameters that are trained, and the buffers that a method named kept_... to find them again after a resume; by name,
    sharing memory with the model."""
    kept = {name: b for name, b in model.named_buffers() if name.rpartition(".")[2].startswith("kept_")}
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} | kept


def load_trained(folder: Path, model: PeftModel) -> None:
    """Set the trained parameters of `model` to those of a checkpoint or run. Raises `UserError` if they are others."""
    try:
        state = load_file(folder / TRAINED)
    except SafetensorError as error:
        raise UserError(f"{folder} is damaged ({error}): resume from another checkpoint by naming its folder") from error
    own = trained_state(model)
    if {name: p.shape for name, p in state.items()} != {name: p.shape for name, p in own.items()}:
        raise UserError(f"{folder} was written by another method or with other settings: resume with the same recipe and flags")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _go_on_from(run: Path, model) -> None:
    """Set `model` to what the run learned: a whole model was loaded as such; an adapter's method and settings must be the same."""
    if (run / "config.json").is_file():
        return
    if not isinstance(model, PeftModel) or not (run / TRAINED).is_file():
        raise UserError(f"--start_from {run} is an adapter: go on with the recipe that made it")
    own, theirs = model.peft_config[model.active_adapter], PeftConfig.from_pretrained(run)
    for name in sorted(own.__dict__.keys() - MAY_DIFFER):
        mine, other = ((set(value) if isinstance(value, list) else value) for value in (getattr(own, name), getattr(theirs, name, None)))
        if mine != other:
            raise UserError(f"--start_from {run}: its {name} is {other}, this one's {mine}: use the same recipe and flags")
    load_trained(run, model)


def _check_same_kind(checkpoint, model) -> None:
    """Raise `UserError` if a PEFT method is to resume from a whole model's checkpoint, or the other way round."""
    if (Path(checkpoint) / TRAINED).is_file() != isinstance(model, PeftModel):
        raise UserError(f"{checkpoint} is no checkpoint of this method: resume with the recipe and the flags that wrote it")


def choose_attention(model, length: int) -> None:
    """On a CPU, plain matrix products for short batches, PyTorch's fused kernel for long ones; the result is the same.

    The fused kernel saves memory that grows with the square of the length, which is what makes it faster from some 400 tokens on; below,
    a training step of SmolLM2-135M took it 1.2 times as long (docs/benchmarks.md).
    """
    if model.device.type != "cpu":
        return
    wanted = "eager" if length < 400 else "sdpa"
    if {model.config._attn_implementation, wanted} == {"eager", "sdpa"}:  # leaves a kernel that the user chose alone
        model.set_attn_implementation(wanted)


@torch.inference_mode()
def dataset_outputs(model, task, rows, description: str, tokens_per_batch: int = 2048) -> list[tuple[np.ndarray, ...]]:
    """What `prediction_step` gives for each of `rows`, in their order and without gradients: (sums (2,), the task's own outputs ...).

    `model` may be an ensemble. The rows (features of the task) go through in order of their length, so that little is padded.
    """
    order, out, batch = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"])), [()] * len(rows), []
    for position, i in enumerate(tqdm(order, desc=description, unit="rows")):
        batch.append(i)
        following = order[position + 1: position + 2]
        if following and len(rows[following[0]]["input_ids"]) * (len(batch) + 1) <= tokens_per_batch:
            continue
        inputs = {name: tensor.to(model.device) for name, tensor in task.collate([rows[j] for j in batch]).items()}
        passes = []
        for member in losses.members(model):
            choose_attention(losses.network(member), inputs["input_ids"].shape[1])
            passes.append(task.loss(member, inputs))
        parts = passes[0] if len(passes) == 1 else losses.average(passes)
        columns = [tensor.cpu().numpy() for tensor in (losses.row_sums(parts), *task.outputs(parts))]
        for j, *values in zip(batch, *columns, strict=True):
            out[j] = tuple(values)
        batch = []
    return out


def mean_loss(sums: np.ndarray) -> dict[str, float]:
    """Mean negative log-likelihood in nats per supervised item and its exponential, from the `sums` of all rows, (rows, 2)."""
    nll, items = sums.sum(axis=0)
    return {"loss": float(nll / items), "perplexity": perplexity(nll, items)}


def _has_dropout(model) -> bool:
    modules = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    # Attention drops without a module; a classifier never does, and its probability is set in models that have none (GPT-NeoX).
    return modules or any(p for name, p in regularize.dropouts(losses.network(model).config).items() if name != "classifier_dropout")


def _hold_frozen_in_bf16(model) -> None:
    """Frozen weights need no fp32: autocast would cast them to bf16 at every use anyway. Trained ones stay as they are.

    Only below a PEFT method, which saves its own parameters alone: a whole model is saved with its frozen layers, unrounded.
    """
    if not isinstance(model, PeftModel):
        return
    for name, parameter in model.named_parameters():
        # AdaLoRA keeps a number of its formula, the rank it began with, among the parameters: that one stays exact.
        if not parameter.requires_grad and parameter.is_floating_point() and "ranknum" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
