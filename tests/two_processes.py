"""What each of two processes does for test_processes.py, which launches this file: evaluate.py, all recipes, a signal, broken numbers."""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

from test_methods import run_recipe
from transformers import TrainerCallback

from recipes.common import errors, faults, processes
from recipes.common.trainer import RecipeTrainer


class SignalToRank1(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Signalled(RecipeTrainer):
    def __init__(self, *, callbacks, **kwargs):
        super().__init__(callbacks=[*callbacks, SignalToRank1()], **kwargs)


class BrokenOnRank1(RecipeTrainer):
    """In step 4, the loss is no number on rank 1 alone."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 and self.args.process_index == 1 else loss


class Leaps(RecipeTrainer):
    """In step 4, the loss is a hundredfold on rank 1 alone."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * 100 if self.state.global_step == 3 and self.args.process_index == 1 else loss


def main(job: dict):
    model, data, folder = job["model"], job["data"], Path(job["folder"])
    errors.install()
    runs = [word for run in job["scored"] for word in ("--run", run)]
    sys.argv = ["scripts/evaluate.py", *runs, "--dtype", "float32", "--max_new_tokens", "8"]
    runpy.run_path(sys.argv[0])["main"]()
    for recipe in job["recipes"]:
        run_recipe(recipe, model, data, folder / recipe, *job["flags"])
    run_recipe("lora", model, data, folder / "uneven", "--max_steps", "1", "--per_device_train_batch_size", "5")
    try:
        run_recipe("lora", model, data, folder / "stopped", *job["flags"], trainer_class=Signalled)
    except SystemExit as end:
        (folder / f"status-{processes.rank()}").write_text(str(end.code))
    run_recipe("lora", model, data, folder / "stopped", *job["flags"], "--resume_from_checkpoint", "True")
    for on_nan in ("skip", "rollback", "stop"):
        try:
            run_recipe("lora", model, data, folder / on_nan, *job["flags"], "--on_nan", on_nan, trainer_class=BrokenOnRank1)
        except errors.UserError as error:
            (folder / f"{on_nan}-{processes.rank()}").write_text(str(error))
    faults.NEEDED = 2
    trainer = run_recipe("lora", model, data, folder / "leap", *job["flags"], trainer_class=Leaps)
    (folder / f"leap-{processes.rank()}").write_text(json.dumps([trainer.watch.events, trainer.watch.losses]))
    run_recipe("lora", model, folder / "nothing", folder / "error")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
