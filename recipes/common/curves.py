"""TensorBoard's event files: the Trainer's log as curves. What can't be written costs the curves, never the run.

In place of transformers' callback, whose writer is a thread: where the disk is full, that thread prints a traceback and ends the training.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import text
from transformers import TrainerCallback
from transformers.integrations.integration_utils import default_logdir, rewrite_logs

from recipes.common.redaction import redacted


class Curves(TrainerCallback):
    """Writes what the Trainer logs, and the settings without their secrets; `tell` hears once that it can't."""

    def __init__(self, tell: Callable[[str], None]):
        self.tell, self.file, self.failed = tell, None, False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        self._write(args, text("args", _json(args.to_dict())), state.global_step)
        if getattr(model, "config", None) is not None:
            self._write(args, text("model_config", _json(model.config.to_dict())), state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        values = [Summary.Value(tag=name, simple_value=value) for name, value in rewrite_logs(logs).items()
                  if isinstance(value, int | float)]
        self._write(args, Summary(value=values), state.global_step)

    def _write(self, args, summary, step: int) -> None:
        if self.failed:
            return
        try:
            if self.file is None:
                folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or Path(args.output_dir) / default_logdir()).expanduser()
                folder.mkdir(parents=True, exist_ok=True)
                name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
                self.file = (folder / name).open("ab", buffering=0)  # left open: the final model's scores come after the training
                self._record(Event(file_version="brain.Event:2"))
            self._record(Event(summary=summary, step=step))
        except OSError as error:
            self.failed = True
            self.tell(f"the curves for TensorBoard can't be written ({error.strerror or error}): the training goes on without them, and "
                      "run.json and report.html will hold them")

    def _record(self, event) -> None:
        event.wall_time = time.time()
        RecordWriter(self.file).write(event.SerializeToString())


def _json(settings: dict) -> str:
    return json.dumps(redacted(json.loads(json.dumps(settings, default=str))), indent=2)
