"""The Trainer of all recipes: transformers' own, with an exact and cheap loss for every task, and exact resume for PEFT.

What differs, each in one place:

- `compute_loss` takes the task's loss function (losses.py), which projects to the vocabulary only where a token is trained on (the
  logits are the largest tensor of a step);
- a batch is a list: the rows of a step in the groups that they are run in (batches.py), with one loss for all of them; where the
  attention kernel skips what lies between rows, those of a group are packed into one;
- --torch_compile compiles the blocks, for the passes of training only (compilation.py);
- `_parts` takes the faster attention kernel for the batch at hand (cpu_attention.py);
- `prediction_step` hands on two numbers a row in place of its logits, so that the dev loss is a mean over all items, exactly, and
  whatever few numbers more the task's metrics need;
- `evaluation_loop` also scores answers written to some dev rows, if asked to (dev_answers.py);
- `_save` and `_load_*` keep a PEFT method's trained parameters as they are, where PEFT's own files may hold only what they amount to;
- checkpoints are whole or not there (checkpoints.py), and signals, broken numbers and lack of memory are met (faults.py).
"""

import contextlib
import pickle
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import TorchDynamoPlugin, broadcast_object_list
from peft import PeftModel
from torch.utils.data import DataLoader, IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SchedulerType
from transformers.utils import is_flash_attn_2_available

from recipes.common import (
    batches,
    checkpoints,
    compilation,
    cpu_attention,
    curves,
    deadline,
    dev_answers,
    faults,
    losses,
    regularize,
    trained,
)
from recipes.common.errors import UserError
from recipes.common.redaction import redacted
from recipes.common.scoring import mean_loss
from recipes.common.wording import counted

GO_ON = "go on with --resume_from_checkpoint"
# Flag -> what an optimizer calls it.
OPTIMIZER_SETTINGS = {"learning_rate": ("lr",), "layer_lr_decay": ("lr",), "weight_decay": ("weight_decay",), "adam_beta1": ("betas",),
                      "adam_beta2": ("betas",), "adam_epsilon": ("eps",)}


class RecipeTrainer(Trainer):
    """`transformers.Trainer` for the loss and the metrics of a `task` (tasks.Task), with the techniques that `shared`
    (args.SharedArguments) asks for. `method` (args.Method) is written into checkpoints, to be compared when a run goes on."""

    def __init__(self, *, model, args, task, shared, callbacks, method=None, **kwargs):
        self.watch, self.method = faults.Watch(self, shared.on_nan), method
        self.stage, self.allowed = None, {}  # where a checkpoint is being written; what differs from the run that is resumed
        self.came_from: Path | None = None  # the checkpoint of another run folder that this run went on from
        callbacks = [*callbacks, self.watch]
        if "tensorboard" in args.report_to:
            callbacks.append(curves.Curves(self.watch.tell))
        if shared.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(shared.early_stopping_patience))
        if task.old is not None:
            callbacks.append(BeforeTraining(self))
        callbacks += task.callbacks
        if shared.max_minutes is not None:
            callbacks.append(StopAfter(60 * shared.max_minutes, self.watch))
        self.task, self.shared, self.forgetting = task, shared, {}
        prepare(model, args, shared, method)
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
        self.remove_callback(TensorBoardCallback)  # curves.py is in its place
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the items of the whole step, for any model
        self._loss_shifts_labels = task.loss is losses.next_token
        # A prefix is put before a row, not before each of several in one; adversarial embeddings are measured row by row.
        has_prefix = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        self.packed = (self._loss_shifts_labels and batches.packs(losses.network(model)) and not has_prefix and self.adversary is None)
        self.label_names = ["labels"]
        self.questions = []
        if shared.eval_generate_rows:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise UserError("--eval_generate_rows needs the whole model on each device, and FSDP or DeepSpeed divides it: leave it out")
            self.questions = dev_answers.questions(task.dev, task.tokenizer, shared.eval_generate_rows,
                                                   losses.network(model).config.is_encoder_decoder)

    def train(self, *args, **kwargs):
        """Train; where forgetting is to be measured, the old rows are scored before and after, into `forgetting`."""
        if checkpoint := kwargs.get("resume_from_checkpoint"):
            self.allowed = checkpoints.check_unchanged(Path(checkpoint), self._asked(), self.shared.allow_changed)
            self._leave_others(Path(checkpoint))
        for sentence in checkpoints.changed_since(Path(self.shared.repeats), self._asked()) if self.shared.repeats else ():
            self.watch.tell(sentence)
        self._say_what_is_repeated()
        compiled = contextlib.nullcontext()
        if self.args.torch_compile:
            self.watch.tell(compilation.NOTE)
            compiled = compilation.compiled_blocks(losses.network(self.model), self.args)
        self.watch.begun = time.monotonic()
        with self.watch.signals(), compiled:
            try:
                result = super().train(*args, **kwargs)
            except pickle.UnpicklingError as error:  # torch reads optimizer.pt and its like as tensors and plain containers alone
                raise UserError(f"{checkpoint} holds a pickle of more than tensors, which is not opened, as that can run any code in it: "
                                "go on from a checkpoint that this project wrote, or start from its weights with --model") from error
        self._say_if_stopped_early()
        counts = torch.tensor([[self.watch.padded, self.watch.positions]], device=self.args.device)
        padded, positions = self.accelerator.gather(counts).sum(0).tolist()
        self.padding_share = padded / positions if positions else 0.0
        if self.task.old is not None:
            self.forgetting["after"] = self._scores_on_old_rows()
        return result

    def _say_if_stopped_early(self):
        step, last = self.state.global_step, self.state.max_steps
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and step < last:
                count = callback.early_stopping_patience
                if callback.early_stopping_patience_counter >= count:
                    self.watch.tell(f"--early_stopping_patience {count}: stopped after {step} of {last} steps, as no better dev "
                                    f"{self.args.metric_for_best_model.removeprefix('eval_')} came in {count} "
                                    f"evaluation{'s' if count > 1 else ''}"
                                    + (f"; the best was that of step {best}" if (best := self.state.best_global_step) else ""))

    def _leave_others(self, checkpoint: Path):
        # A run that goes on from an earlier checkpoint must never take up a later one, of the life that it leaves.
        folder, step = Path(self.args.output_dir), checkpoints.read_manifest(checkpoint)["step"]
        if checkpoint.resolve().parent != folder.resolve():
            self.came_from = checkpoint
        elif origin := checkpoints.origin(checkpoint):
            self.came_from = Path(origin)
        with self.args.main_process_first(desc="setting later checkpoints aside"):
            for path in checkpoints.found_in(folder) if self.args.process_index == 0 else ():
                if checkpoints.step_of(path) > step:
                    checkpoints.set_aside(path)

    def _say_what_is_repeated(self):
        # Processes need equally many rows in an epoch's last step: Accelerate completes it with the epoch's first ones.
        if self.shared.streaming:  # there is no epoch
            return
        a_step = self.args.train_batch_size * self.args.world_size
        missing = -len(self.train_dataset) % a_step
        if self.args.world_size > 1 and missing and not (self.args.dataloader_drop_last or self.shared.tokens_per_step):
            self.watch.tell(f"each epoch ends with {counted(missing, 'rows')} that it began with, as {len(self.train_dataset)} rows don't "
                            f"fill batches of {a_step}; --tokens_per_step repeats none")

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

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's, with the scores of answers written to dev rows where --eval_generate_rows asks for them."""
        dataloader = Timely(dataloader, f"evaluation after step {self.state.global_step}")
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.questions and metric_key_prefix == "eval":
            with self.accelerator.autocast():
                scores = dev_answers.score(self.accelerator.unwrap_model(self.model), self.task.tokenizer, self.questions,
                                           self.shared.eval_generate_tokens, self.shared.eval_generate_seconds,
                                           self.args.process_index, self.args.world_size)
            output.metrics.update({f"eval_{name}": value for name, value in scores.items()})
        return output

    def _scores_on_old_rows(self) -> dict[str, float]:
        # predict() and not evaluate(): early stopping listens to every evaluation. It draws a random number, for a seed of the loader,
        # which must not change the training.
        with torch.random.fork_rng(devices=[]):
            scores = self.predict(self.task.old, metric_key_prefix="old").metrics
        return _named_old({name: value for name, value in scores.items() if not name.endswith(("_runtime", "_per_second", "_time"))})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the supervised items of the optimizer step, micro-batches and processes together."""
        if self.packed:
            inputs = batches.pack(inputs)
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

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        """The Trainer's; batches to train on are lists of micro-batches."""
        self.data_collator = self._train_collator() if is_training else self.task.collate
        return super()._get_dataloader(*args, is_training=is_training, **kwargs)

    def _train_collator(self):
        group, limit = None, self.shared.micro_batch_tokens
        # Where each pass gathers weights from all processes, all must make equally many.
        if limit is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            group = batches.grouping(losses.network(self.model), self.args.bf16, limit, self.packed)
        return partial(batches.collate, one=self.task.collate, group=group, texts=self.task.texts)

    def _get_train_sampler(self, train_dataset=None):
        if not self.shared.tokens_per_step:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return batches.StepsByTokens(batches.lengths(self.train_dataset, self.task.texts), self.shared.tokens_per_step, seed,
                                     self.args.train_sampling_strategy == "random", self.args.world_size, self.args.process_index)

    def _get_num_items_in_batch(self, batch_samples, device):
        return super()._get_num_items_in_batch([micro_batch for batch in batch_samples for micro_batch in batch], device)

    def _track_num_input_tokens(self, inputs):
        # At once: processes add up their counts, and may differ in the number of micro-batches.
        real = torch.cat([batches.real(micro_batch, self.task.texts) for micro_batch in inputs])
        super()._track_num_input_tokens({"input_ids": real, "attention_mask": real})  # it counts the one or the other

    def floating_point_ops(self, inputs):
        """Those of all micro-batches, as the Trainer counts them."""
        return sum(map(super().floating_point_ops, inputs))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of each micro-batch of the list `inputs`, in pieces where memory runs out. Returns the loss, their sum."""
        total, run = 0, partial(self._forward_and_backward, model, num_items_in_batch=num_items_in_batch)
        for i, micro_batch in enumerate(inputs):
            real = batches.real(micro_batch, self.task.texts)
            tokens = int(real.sum())
            positions = tokens if self.packed else len(real)
            self.watch.padded, self.watch.positions = self.watch.padded + positions - tokens, self.watch.positions + positions
            # Processes exchange their gradients once, with the last one; whether they do so then is the Trainer's decision.
            with self.accelerator.no_sync(model) if i + 1 < len(inputs) else contextlib.nullcontext():
                total = total + self.watch.train(run, micro_batch)
        return total

    def _build_accelerator_args(self, **kwargs):
        # With the Trainer's plugin, Accelerate would compile the whole model.
        own = {"dynamo_plugin": TorchDynamoPlugin(backend="no")} if self.args.torch_compile else {}
        return super()._build_accelerator_args(**kwargs) | own

    def _forward_and_backward(self, model, inputs, num_items_in_batch):
        """Forward and backward; twice or more where --adversarial asks for it. Returns the loss on the rows as they are."""
        with compilation.running() if self.args.torch_compile else contextlib.nullcontext():
            return self._passes(model, inputs, num_items_in_batch)

    def _passes(self, model, inputs, num_items_in_batch):
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
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self._train_collator(),
                          pin_memory=self.args.dataloader_pin_memory)

    def create_optimizer(self, *args, **kwargs):
        """The Trainer's, its learning rates scaled by --layer_lr_decay."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.shared.layer_lr_decay != 1 and new:
            regularize.decay_by_layer(optimizer, self.model.named_parameters(), self.shared.layer_lr_decay)
        return optimizer

    def create_scheduler(self, num_training_steps, *args, **kwargs):
        """The Trainer's, with a warm-up that leaves at least the last step at the full rate; the first step of a warm-up has a rate of 0,
        so a run of one step would learn nothing."""
        asked, last = self.args.warmup_steps, num_training_steps - 1
        if self.lr_scheduler is None and self.args.get_warmup_steps(num_training_steps) > last and _warms_up(self.args.lr_scheduler_type):
            self.args.warmup_steps = last
            self.watch.tell(f"--warmup_steps {asked:g} would be the whole training of {num_training_steps} "
                            f"step{'s' if num_training_steps > 1 else ''}: the warm-up takes {last}")
        try:
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        finally:
            self.args.warmup_steps = asked

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(None, (sums, ...), labels): `sums` are those of losses.row_sums, a row's negative log-likelihood in nats and its number of
        items; after it come the task's own outputs."""
        inputs = self._prepare_inputs(inputs)

        def outputs(piece):
            with torch.no_grad(), self.compute_loss_context_manager():
                parts = self._parts(model, piece)
            return losses.row_sums(parts, piece.get("bytes")), *self.task.outputs(parts)

        return None, self.watch.evaluate(outputs, inputs), inputs["labels"]

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        """The micro-batches of a step. Raises `UserError` where the data don't come."""
        coming = deadline.timed(epoch_iterator, f"step {self.state.global_step + 1}", GO_ON)
        return super().get_batch_samples(coming, *args, **kwargs)

    def _get_grad_norm(self, *args, **kwargs):
        return self.watch.checked(super()._get_grad_norm(*args, **kwargs))

    def _summed(self, parts) -> torch.Tensor:
        return sum(part.nll(self.args.label_smoothing_factor).sum() for part in parts)

    def _parts(self, model, inputs) -> list[losses.Part]:
        if self.shared.attention == "auto":
            cpu_attention.choose(losses.network(model), inputs["input_ids"].shape[1])
        return self.task.loss(model, inputs)

    def _metrics(self, prediction) -> dict[str, float]:
        sums, *outputs = prediction.predictions
        scores = mean_loss(sums)
        if not self.task.per_token:
            del scores["perplexity"]
        return scores | self.task.metrics(*outputs, prediction.label_ids)

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, with every token on the command line; run.json says it all
        if isinstance(self.model, PeftModel):
            trained.save(self.model, folder)

    def _asked(self) -> dict:
        recipe, method = Path(sys.argv[0]).stem, asdict(self.method) if self.method else {}
        return redacted(checkpoints.asked_for(recipe, self.task, asdict(self.shared), method, self.args))

    def _get_output_dir(self, trial=None):
        return str(self.stage or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial):
        # The Trainer's own, but written aside and put in its place when it is whole.
        folder = Path(self.args.output_dir)
        target, staged = (parent / f"checkpoint-{self.state.global_step}" for parent in (folder, folder / checkpoints.STAGE))
        only_model = self.args.save_only_model
        with checkpoints.failure_told(target, folder, self.came_from):
            try:
                self.stage = staged.parent
                self.args.save_only_model = only_model and not self.watch.stopping  # who stops a run wants it to go on
                super()._save_checkpoint(model, trial)
            finally:
                self.stage, self.args.save_only_model = None, only_model
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(target)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                checkpoints.put_in_place(staged, folder, self._asked(), self.came_from)
                checkpoints.rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _init_training_state(self, max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial):
        epochs, batches = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        if not resume_from_checkpoint:
            return epochs, batches
        ended = self.state.global_step >= max_steps  # the Trainer would take one step more where that is within an epoch
        for callback in [callback for callback in self.callback_handler.callbacks if isinstance(callback, ExportableState)]:
            kept = self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
            for name, value in kept["attributes"].items():
                setattr(callback, name, value)
            if isinstance(callback, EarlyStoppingCallback):
                ended |= callback.early_stopping_patience_counter >= callback.early_stopping_patience
        self._find_best(Path(resume_from_checkpoint).parent)
        self.state.compute_steps(self.args, max_steps)  # else --save_steps and its like would stay those of before
        changes = f"; {'; '.join(self.allowed.values())}" if self.allowed else ""
        self.watch.tell(f"resumed from {resume_from_checkpoint}{changes}")
        return (num_train_epochs, 0) if ended else (epochs, batches)

    def _find_best(self, folder: Path):
        # The run folder may have been moved, and the best checkpoint may be damaged.
        if not self.state.best_global_step:
            return
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if wrong := checkpoints.fault(best):
            self.state.best_model_checkpoint = self.state.best_metric = self.state.best_global_step = None
            self.watch.tell(f"{best}, the best so far, can't be used ({wrong}): the best is chosen among the following ones")
        else:
            self.state.best_model_checkpoint = str(best)

    def _finalize_training(self, *args, **kwargs):
        # With a limit of 1 the Trainer would delete the last checkpoint before the run is finished, if it is not the best.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        trained.check_same_kind(resume_from_checkpoint, self.model)
        if not self._load_trained(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        # The state of the optimizer brings its settings along: those that --allow_changed names are put back to what is asked now.
        names = {name for flag, kept in OPTIMIZER_SETTINGS.items() if flag in self.allowed for name in kept}
        wanted = [dict(group) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, fresh in zip(self.optimizer.param_groups, wanted, strict=True):
            if "lr" in names:  # wherever its schedule stands
                ratio = fresh["initial_lr"] / group["initial_lr"] if group["initial_lr"] else 0
                group.update(lr=group["lr"] * ratio, initial_lr=fresh["initial_lr"])
            group.update({name: fresh[name] for name in names - {"lr"} if name in group})
        if "lr" in names:
            self.lr_scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_best_model(self):
        if not self._load_trained(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result):
        # A tied weight is saved under one of its names, and so missing under the other: no matter for a warning.
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in self.model.all_tied_weights_keys]
        super()._issue_warnings_after_load(load_result)

    def _load_trained(self, checkpoint) -> bool:
        # A prefix behind a projection is saved by PEFT as the projection's result: right for use, useless to train on.
        if not isinstance(self.model, PeftModel):
            return False
        trained.load(Path(checkpoint), self.model)
        return True


class Timely:
    """A loader of batches to evaluate on, whose batches have a deadline."""

    def __init__(self, loader, what: str):
        self.loader, self.what = loader, what

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return deadline.timed(self.loader, self.what, GO_ON)


def _warms_up(scheduler: SchedulerType) -> bool:
    return scheduler not in (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def _named_old(scores: dict) -> dict[str, float]:
    return {name.removeprefix("old_"): value for name, value in scores.items() if name.startswith("old_")}


class BeforeTraining(TrainerCallback):
    """Measures what may be forgotten as soon as the model is ready to train: scored any earlier, Accelerate would take it for one that is
    only evaluated, and several processes would each train a model of their own."""

    def __init__(self, trainer: RecipeTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.measure_before()


class StopAfter(TrainerCallback):
    """Ends the training after so many seconds, evaluations and earlier lives of the run included, on all processes at the same step."""

    def __init__(self, seconds: float, watch: faults.Watch):
        self.seconds, self.watch = seconds, watch

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = time.monotonic() - self.watch.seconds

    def on_step_end(self, args, state, control, **kwargs):
        # The first process decides: the clocks of several differ, and one that goes on alone would wait for the others for ever.
        [over] = broadcast_object_list([time.monotonic() - self.begun >= self.seconds])
        if over and not control.should_training_stop:
            control.should_training_stop = True
            if state.is_world_process_zero and state.global_step < state.max_steps:
                print(f"--max_minutes {self.seconds / 60:g}: stopped after {state.global_step} of {state.max_steps} steps")


def prepare(model, training, shared, method=None) -> None:
    """What an adapted `model` needs before it is trained: frozen weights as they are computed with, what --start_from
    learned, and the attention kernel."""
    if training.bf16:
        _hold_frozen_in_bf16(model)
    if shared.start_from:
        trained.go_on_from(Path(shared.start_from), model, method)
    network, kernel = losses.network(model), shared.attention
    if kernel == "auto" and _flash_attention_suits(network, training):
        kernel = "flash_attention_2"
        print("attention: flash_attention_2, as flash-attn is installed; --attention sdpa does without it")
    if kernel != "auto":
        _set_attention(network, kernel, training.device)


def _flash_attention_suits(model, training) -> bool:
    # The kernel multiplies in 16 bits alone, on a GPU, and knows no attention but that of a plain decoder or encoder.
    return (training.device.type == "cuda" and (training.bf16 or training.fp16) and model._supports_flash_attn
            and model.config._attn_implementation == "sdpa" and is_flash_attn_2_available())


def _set_attention(model, kernel: str, device: torch.device) -> None:
    """Raise `UserError` where the model or this machine lacks it."""
    if kernel == "flex_attention" and device.type == "cpu":
        raise UserError("--attention flex_attention can't be trained with on a CPU, where it has no backward pass: leave the flag out")
    try:
        model.set_attn_implementation(kernel)
    except (ImportError, ValueError) as error:
        raise UserError(f"--attention {kernel}: {' '.join(str(error).split())}") from error


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
