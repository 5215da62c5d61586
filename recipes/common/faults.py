"""What happens to a run from outside and what goes wrong in it: signals, broken numbers, too little memory.

`Watch` is the Trainer's callback for all of these. What it remembers is part of every checkpoint, so that a resumed run knows it too.
"""

import contextlib
import gc
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_concat

from recipes.common import checkpoints
from recipes.common.errors import UserError

STOPPED = 75  # exit status of a run that a signal ended in good order: sysexits.h's EX_TEMPFAIL, "try again later"
GIVE_UP = 10  # steps in a row whose numbers are broken: then the weights are, and to go on would only take time
REMEMBERED, NEEDED = 50, 20  # losses that a spike is measured against, and how many there must be
NAMED = 8  # rows that a sentence names
SEARCHED = 200_000  # rows of a data set that is searched for their numbers, which takes some seconds


class Watch(TrainerCallback, ExportableState):
    """Watches the run of `trainer` (RecipeTrainer). It must come after the Trainer's own callbacks, which decide when to save."""

    def __init__(self, trainer, on_nan: str):
        self.trainer, self.on_nan = trainer, on_nan
        self.events: list[dict] = []  # what happened, for run.json
        self.losses: list[float] = []  # of the last steps
        self.rows_at_once: int | None = None  # most rows that fit into memory, once that was too few
        self.eval_rows_at_once: int | None = None
        self.broken_in_a_row = 0
        self.unlogged: list | None = None  # loss summed since the last line of the log, and the step of that line
        self.signal = None
        self.lives = 0  # of the run so far, this one included
        self.seconds, self.begun = 0.0, None  # of training in earlier lives; when this one began
        self.padded = self.positions = 0  # that were run in training, by this process
        self.rolled_back_to: str | None = None  # since the last step whose numbers were whole
        self.started = self.stopping = self.save_at_epoch_end = False
        self.seen: list[dict] = []  # the micro-batches of this step so far
        self.seen_losses: list[torch.Tensor] = []
        self.broken = None

    def state(self) -> dict:
        """What a checkpoint keeps."""
        if self.started:  # the Trainer also asks before it trains
            self.unlogged = [self.trainer._tr_loss.item(), self.trainer._globalstep_last_logged]
        names = ("events", "losses", "rows_at_once", "eval_rows_at_once", "broken_in_a_row", "unlogged", "lives", "padded", "positions",
                 "rolled_back_to")
        seconds = self.seconds + (time.monotonic() - self.begun if self.begun else 0)
        return {"args": {}, "attributes": {"seconds": seconds, **{name: getattr(self, name) for name in names}}}

    def tell(self, sentence: str) -> None:
        """Print what happened and keep it for run.json."""
        self.events.append({"step": self.trainer.state.global_step, "event": sentence})
        if self.trainer.args.process_index == 0:
            print(f"note: {sentence}")

    def on_train_begin(self, args, state, control, **kwargs):
        """After a resume, the next line of the log is the mean over all steps since the last one, also those before the interruption."""
        if self.unlogged:
            self.trainer._tr_loss += self.unlogged[0]
            self.trainer._total_loss_scalar -= self.unlogged[0]  # the train_loss at the end is a mean over the steps since the resume
            self.trainer._globalstep_last_logged = self.unlogged[1]
        if args.process_index == 0 and self.trainer.hp_search_backend is None:
            with checkpoints.failure_told(Path(args.output_dir) / checkpoints.LIVES, Path(args.output_dir), self.trainer.came_from):
                self.lives = checkpoints.count_life(Path(args.output_dir), self.lives, fresh=not args.resume_from_checkpoint)
        self.started = True

    # Signals

    @contextlib.contextmanager
    def signals(self):
        """While training, the first SIGTERM or SIGINT asks for a checkpoint and an end; a second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process, before = os.getpid(), {}

        def handle(number, frame):
            if os.getpid() != process:  # a worker that reads data: the run tells it when to end
                return
            if self.signal is not None:
                signal.signal(number, signal.SIG_DFL)
                os.kill(process, number)
            self.signal = number
            if self.trainer.args.process_index:  # where rank 0 alone got no signal, it says at least that the run stopped
                return
            # print() could be what was interrupted
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step and writing a checkpoint; once more ends at once\n".encode())

        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            for number, previous in before.items():
                signal.signal(number, previous)
        if self.signal is not None:
            print("the training had ended already: it is scored and saved, which a further signal breaks off", flush=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen, self.seen_losses, self.broken = [], [], None

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop if a signal asked for it. What is to be saved after the last step of an epoch waits for the epoch's own end, so
        that a run that goes on from there has not missed what is done then (evaluation, early stopping)."""
        self.stopping = self._anywhere(self.signal is not None)
        if self._epoch_ends(state) or control.should_training_stop:
            self.save_at_epoch_end, control.should_save = control.should_save, False
        elif self.stopping:
            control.should_save = True

    def on_evaluate(self, args, state, control, **kwargs):
        """A signal during an evaluation need not wait for a further step."""
        self.stopping = self._anywhere(self.signal is not None)
        if self.stopping and not self._epoch_ends(state) and self.trainer.is_in_train:
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        self.stopping = self._anywhere(self.signal is not None)
        if self.save_at_epoch_end or self.stopping:
            control.should_save, self.save_at_epoch_end = True, False

    def on_save(self, args, state, control, **kwargs):
        """The checkpoint is in its place: a run that was asked to end does so. Raises `SystemExit`."""
        if self.stopping:
            if args.process_index == 0:
                print(f"stopped after step {state.global_step} of {state.max_steps}; {args.output_dir}/checkpoint-{state.global_step} is "
                      "written: the same command with --resume_from_checkpoint goes on", flush=True)
            sys.exit(STOPPED)

    def _epoch_ends(self, state) -> bool:
        return state.epoch is not None and float(state.epoch).is_integer()

    def _anywhere(self, here: bool) -> bool:
        """Whether `here` is true in any of the processes."""
        if self.trainer.args.world_size == 1:
            return here
        return bool(self.trainer.accelerator.reduce(torch.tensor(float(here), device=self.trainer.args.device), "sum") > 0)

    # Memory

    def train(self, run: Callable, inputs: dict) -> torch.Tensor:
        """`run` forward and backward over a micro-batch and return its loss; in smaller pieces where memory runs out.

        `run(piece)` adds the gradient of a piece and returns its share of the loss of the optimizer step, so that pieces simply add up.
        A pass that broke off may have added to some gradients and not to others: they are set to zero, and the micro-batches of this
        step that were done before are done again.
        """
        def again(rows):
            self._less(f"step {self.trainer.state.global_step + 1}: out of memory while training", rows,
                       "accumulation is raised to match, and a step has as many rows as before")
            self.rows_at_once = rows
            self.trainer.model.zero_grad()
            for earlier in self.seen:
                for piece in pieces(earlier, rows):
                    run(piece)

        loss = sum(in_pieces(run, inputs, self.rows_at_once, again))
        self.seen.append(inputs)
        self.seen_losses.append(loss.detach())
        return loss

    def evaluate(self, run: Callable, inputs: dict):
        """`run` over a batch: tensors whose first dimension is the batch; in smaller pieces where memory runs out."""
        def again(rows):
            self._less(f"after step {self.trainer.state.global_step}: out of memory while evaluating", rows, "the scores are the same")
            self.eval_rows_at_once = rows

        return joined(in_pieces(run, inputs, self.eval_rows_at_once, again))

    def _less(self, what: str, rows: int, effect: str) -> None:
        if self.trainer.args.world_size > 1:
            raise UserError(f"{what}; several processes can't change their batches on the way: halve --per_device_train_batch_size (or the "
                            "eval one) and double --gradient_accumulation_steps")
        if not rows:
            raise UserError(f"{what} with a single row: lower --max_length, or add --activation_checkpointing")
        self.tell(f"{what}: from here on at most {rows} rows at once; {effect}")

    # Numbers

    def checked(self, gradient_norm):
        """The gradient's norm of this step, once loss and gradient are known to be finite; else what --on_nan says is done.

        fp16 is left to its loss scaler, which skips steps with a broken gradient by itself.
        """
        losses = torch.stack(self.seen_losses).tolist()  # here, and not at each micro-batch, as a GPU is waited for
        for batch, loss in zip(self.seen, losses, strict=True):
            if not math.isfinite(loss):
                self.broken = f"the loss is {loss}", [batch]
                break
        if self.broken is None and not self.trainer.args.fp16 and not math.isfinite(float(gradient_norm)):
            self.broken = f"the norm of the gradient is {float(gradient_norm)}", self.seen
        if not self._anywhere(self.broken is not None):
            self.broken_in_a_row, self.rolled_back_to = 0, None
            self._watch_for_spikes(sum(losses))
            return gradient_norm
        what = self._what_broke()
        self.broken_in_a_row += 1
        if self.on_nan == "stop" or self.broken_in_a_row >= GIVE_UP:
            self._stop(what)
        undone = self._roll_back(what) if self.on_nan == "rollback" else ""
        self.trainer.model.zero_grad()  # without gradients, the optimizer changes nothing in this step
        self.tell(f"step {self.trainer.state.global_step + 1}: {what}; {undone}the step is left out")
        return gradient_norm

    def _what_broke(self) -> str:
        """What is broken, and on which rows; the same sentence in all processes, whose gradients are one."""
        own = None
        if self.broken is not None:
            what, batches = self.broken
            own = what.startswith("the loss"), what, self._rows(batches) + self._of_rank()
        there = [broken for broken in self._of_all(own) if broken]
        there = [broken for broken in there if broken[0]] or there  # a broken loss is what broke the gradient, of every process
        return f"{there[0][1]} on {', '.join(rows for _, _, rows in there)}"

    def _of_rank(self) -> str:
        return f" of rank {self.trainer.args.process_index}" if self.trainer.args.world_size > 1 else ""

    def _of_all(self, own) -> list:
        """What each process has."""
        return [own] if self.trainer.args.world_size == 1 else gather_object([own])

    def _stop(self, what: str, why: str = ""):
        folder, step = Path(self.trainer.args.output_dir), self.trainer.state.global_step
        last = checkpoints.last_whole(folder, self.trainer.came_from, up_to=step)
        rest = f"{last} is the last whole checkpoint" if last else "no checkpoint was written yet"
        many = f" ({GIVE_UP} steps in a row were broken)" if self.broken_in_a_row >= GIVE_UP else why
        raise UserError(
            f"step {step + 1}: {what}{many}; look at these rows, lower --learning_rate, "
            f"or leave such steps out with --on_nan skip; {rest}")

    def _roll_back(self, what: str) -> str:
        """Set weights and optimizer back to the newest whole checkpoint of a step before this one; the data and the schedule of the
        learning rate go on. Where the next step is broken too, the checkpoint is no help, and the run ends."""
        trainer = self.trainer
        folder, step = Path(trainer.args.output_dir), trainer.state.global_step
        [checkpoint] = broadcast_object_list([checkpoints.last_whole(folder, trainer.came_from, up_to=step)])  # rank 0 decides for all
        if checkpoint is None:
            self._stop(what, " (and there is no checkpoint to go back to)")
        if self.rolled_back_to:
            self._stop(what, f" (the step before was broken too, and after it the run went back to {self.rolled_back_to})")
        self.rolled_back_to = str(checkpoint)
        schedule = trainer.lr_scheduler.state_dict()
        trainer._load_from_checkpoint(str(checkpoint))
        trainer._load_optimizer_and_scheduler(str(checkpoint))
        trainer.lr_scheduler.load_state_dict(schedule)
        return f"weights and optimizer are those of {checkpoint} again, and "

    def _watch_for_spikes(self, own: float) -> None:
        """`own`: the loss of this process. All decide on the mean of theirs, and so alike."""
        several = self.trainer.args.world_size > 1
        loss = self.trainer.accelerator.reduce(torch.tensor(own, device=self.trainer.args.device), "mean").item() if several else own
        if len(self.losses) >= NEEDED:
            mean, deviation = statistics.fmean(self.losses), statistics.pstdev(self.losses)
            if loss > max(1.5 * mean, mean + 5 * deviation):
                _, rows = max(self._of_all((own, self._rows(self.seen) + self._of_rank())))  # where it is highest
                self.tell(f"step {self.trainer.state.global_step + 1}: the loss leapt to {loss:.3f}, from {mean:.3f} on average, on {rows}")
        self.losses = [*self.losses, loss][-REMEMBERED:]

    def _rows(self, batches: list[dict]) -> str:
        return rows_named(batches, self.trainer.train_dataset, self.trainer.processing_class)


def rows_named(batches: list[dict], dataset, tokenizer) -> str:
    """Which rows of `dataset` (features with input_ids) the batches hold: their numbers, from 1, and how they begin. The numbers are not
    those of the file, as rows were held out, left out or drawn before, and it is said so.

    Batches carry no numbers, so the rows are found by their tokens. Those that were packed, are streamed or stand in a very large data set
    are told by their beginning.
    """
    found = {}
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found[tuple(ids[mask.bool()].tolist())] = None
    if hasattr(dataset, "__len__") and len(dataset) <= SEARCHED:
        for number, row in enumerate(dataset, start=1):
            ids = tuple(row["input_ids"])
            if ids in found and found[ids] is None:
                found[ids] = number
    names = [(f"{number} " if number else "") + f"({short!r})" for ids, number in found.items()
             if (short := tokenizer.decode(ids[:40], skip_special_tokens=True)[:60]) is not None]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    counted = ", counted among the rows that are trained on" if any(found.values()) else ""
    return f"train row{'s' if len(names) > 1 else ''} {', '.join(names[:NAMED])}{more}{counted}"


def pieces(inputs: dict, rows: int | None) -> list[dict]:
    """A batch cut into batches of at most `rows` rows; every tensor's first dimension is the batch. None: as it is."""
    size = len(next(iter(inputs.values())))
    if rows is None or rows >= size:
        return [inputs]
    return [{name: tensor[start: start + rows] for name, tensor in inputs.items()} for start in range(0, size, rows)]


def in_pieces(run: Callable, inputs: dict, rows: int | None, again: Callable[[int], None]) -> list:
    """[run(piece), ...] over `inputs` in pieces of at most `rows` rows.

    Whenever memory runs out, pieces are halved and all is done anew, after `again(rows)` has put right what the broken pass left behind;
    with 0 rows, it must raise.
    """
    redo = False
    while True:
        try:
            if redo:
                again(rows)
            return [run(piece) for piece in pieces(inputs, rows)]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Outside of `except`, whose traceback would hold the tensors of the broken pass.
        rows, redo = min(rows or math.inf, len(next(iter(inputs.values())))) // 2, True
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def joined(results: list[tuple]) -> tuple:
    """The results of pieces as that of the whole batch; rows of different length are filled up with -100, as the Trainer does it."""
    whole = results[0]
    for piece in results[1:]:
        whole = nested_concat(whole, piece, padding_index=-100)
    return whole


def out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch says that a tensor found no room, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or re.search("can't allocate memory|not enough memory", str(error)) is not None
