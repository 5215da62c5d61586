"""What each of two processes does for test_processes.py, which launches this file: evaluate.py, every recipe, a signal, an error."""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

from test_methods import run_recipe
from transformers import TrainerCallback

from recipes.common import errors, processes
from recipes.common.trainer import RecipeTrainer


class SignalToRank1(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Signalled(RecipeTrainer):
    def __init__(self, *, callbacks, **kwargs):
        super().__init__(callbacks=[*callbacks, SignalToRank1()], **kwargs)


def main(job: dict):
    model, data, folder = job["model"], job["data"], Path(job["folder"])
    errors.install()
    sys.argv = ["scripts/evaluate.py", "--run", job["scored"], "--dtype", "float32", "--max_new_tokens", "8"]
    runpy.run_path(sys.argv[0])["main"]()
    for recipe in job["recipes"]:
        run_recipe(recipe, model, data, folder / recipe, *job["flags"])
    run_recipe("lora", model, data, folder / "uneven", "--max_steps", "1", "--per_device_train_batch_size", "5")
    try:
        run_recipe("lora", model, data, folder / "stopped", *job["flags"], trainer_class=Signalled)
    except SystemExit as end:
        (folder / f"status-{processes.rank()}").write_text(str(end.code))
    run_recipe("lora", model, data, folder / "stopped", *job["flags"], "--resume_from_checkpoint", "True")
    run_recipe("lora", model, folder / "nothing", folder / "error")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
