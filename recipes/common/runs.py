"""The run folder: refused if it holds another run, filled with the model, run.json and report.html when training is done."""

import json
import math
import os
import platform
import resource
import shlex
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import enable_full_determinism, set_seed

from recipes.common import report
from recipes.common.errors import UserError

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "rouge-score", "sacrebleu")
SPEED = ("_runtime", "_per_second")  # what the Trainer adds to the scores of an evaluation


def start(shared, method, training) -> None:
    """Seed everything and refuse an output folder that holds another run. Writes nothing."""
    folder = Path(training.output_dir)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--output_dir {folder}: {existing} is a file: name a folder")
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise UserError(f"--output_dir {folder} can't be written ({error.strerror}): name another folder") from None
    asked = training.resume_from_checkpoint
    if asked and asked.lower() != "true" and not complete(Path(asked)):
        why = "it is incomplete, as its writing was interrupted" if Path(asked).is_dir() else "no such folder"
        raise UserError(f"--resume_from_checkpoint {asked}: {why}")
    if not training.resume_from_checkpoint and ((folder / "run.json").exists() or any(folder.glob("checkpoint-*"))):
        raise UserError(f"--output_dir {folder} holds another run: choose a new name (with make: OUT=runs/NAME), "
                        "or continue it with --resume_from_checkpoint")
    # "runs", the TensorBoard events, is all that a run leaves when it ends before its first checkpoint.
    if not asked and folder.is_dir() and any(path.name != "runs" for path in folder.iterdir()):
        raise UserError(f"--output_dir {folder} holds files that are no run's, which could be overwritten: name a new folder")
    (enable_full_determinism if training.full_determinism else set_seed)(training.seed)
    _use_all_cores(training)
    if training.process_index == 0:
        precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
        rows = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        print(f"{Path(sys.argv[0]).stem}: {precision} on {training.device}, {rows} rows a step, run folder {folder}")


def _use_all_cores(training) -> None:
    """Undo `accelerate launch`'s one thread for a lone process that turns out to have no GPU: it would take several times as long."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # what the launcher leaves behind
    if launched and training.device.type == "cpu" and training.world_size == 1 and torch.get_num_threads() == 1 < cores:
        torch.set_num_threads(cores)
        print(f"note: accelerate launch allows a lone process one thread; on this CPU it uses {cores}")


def steps(rows: int, training) -> int:
    """The optimizer steps that the Trainer will take on `rows` train rows; known before there is a Trainer."""
    if training.max_steps > 0:
        return training.max_steps
    divide = math.floor if training.dataloader_drop_last else math.ceil
    batches = divide(divide(rows / training.train_batch_size) / training.world_size)
    each = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return math.ceil(training.num_train_epochs * each)


def checkpoint(training) -> str | None:
    """The checkpoint to resume from: the one named, or the newest of the run folder; None to start at the beginning."""
    asked = training.resume_from_checkpoint
    if not asked:
        return None
    if asked.lower() != "true":
        return asked
    found = sorted(Path(training.output_dir).glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    newest = next((path for path in found if complete(path)), None)
    if training.process_index == 0:
        for path in found[: found.index(newest) if newest else None]:
            print(f"note: {path} is incomplete, as its writing was interrupted: passed over")
        print(f"resuming from {newest}" if newest else f"{training.output_dir} holds no whole checkpoint: starting at step 0")
    return str(newest) if newest else None


def complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes trainer_state.json last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def finish(trainer, task, shared, method) -> None:
    """Score the dev rows with the final model, save it, write run.json and report.html, and say what to do next."""
    metrics = trainer.evaluate()
    trainer.save_model()
    training = trainer.args
    if not trainer.is_world_process_zero():
        return
    folder = Path(training.output_dir)
    if task.generation:
        task.generation.save_pretrained(folder)
    history = trainer.state.log_history
    seconds = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    parameters = list(trainer.model.parameters())
    record = {
        "recipe": Path(sys.argv[0]).stem,
        "task": task.name,
        "model": asdict(task.source),
        "command": command(training.world_size),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": task.report,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(map(numbers_in, parameters)),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "tokens": trainer.state.num_input_tokens_seen,
        "tokens_per_second": round(trainer.state.num_input_tokens_seen / seconds, 1),
        "peak_memory_mb": peak_memory_mb(),
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "metrics": {f"dev_{key[5:]}": value for key, value in metrics.items() if key.startswith("eval_") and not key.endswith(SPEED)},
        **({"method_report": task.method_report} if task.method_report else {}),
        **({"lineage": task.lineage} if task.lineage else {}),
        **({"forgetting": trainer.forgetting} if trainer.forgetting else {}),
        "method_arguments": asdict(method),
        "shared_arguments": asdict(shared),
        "training_arguments": training.to_dict(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": hardware(),
        "history": history,
    }
    write(folder, record)
    trained, total = record["trainable_parameters"], record["total_parameters"]
    print(f"\n{record['steps']} steps in {seconds:.0f} s, {record['tokens_per_second']:.0f} tokens/s, peak memory "
          f"{record['peak_memory_mb'] / 1000:.1f} GB, {trained:,} of {total:,} parameters trained ({100 * trained / total:.2f} %)")
    print(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in record["metrics"].items()))
    if trainer.forgetting:
        before, after = trainer.forgetting["before"], trainer.forgetting["after"]
        print("old rows, before -> after: "
              + ", ".join(f"{name.replace('_', ' ')} {before[name]:.4f} -> {after[name]:.4f}" for name in after))
    if not math.isfinite(metrics["eval_loss"]):
        raise UserError(f"the training diverged: its dev loss is {metrics['eval_loss']}; lower --learning_rate and train under a new name "
                        f"({folder} is kept for inspection)")
    print(f"saved in {folder}; next:\n  {python()} scripts/evaluate.py --run {folder} --base"
          + (f"\n  {python()} scripts/chat.py --run {folder}" if task.name == "chat" else ""))


def numbers_in(parameter) -> int:
    """How many numbers a parameter stands for; bitsandbytes packs two numbers of 4 bits into one byte."""
    return parameter.quant_state.shape.numel() if type(parameter).__name__ == "Params4bit" else parameter.numel()


def write(folder: Path, record: dict) -> None:
    """Write run.json, whole or not at all, and the report that is made from it. NaN stays visible, as a string."""
    temporary = folder / "run.json.tmp"
    temporary.write_text(json.dumps(visible(record), ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "run.json")
    (folder / "report.html").write_text(report.render(record), encoding="utf-8")


def command(world_size: int = 1) -> str:
    """The command line that repeats this run."""
    launcher = ["python"] if world_size == 1 else ["torchrun", "--nproc_per_node", str(world_size)]
    return shlex.join([*launcher, os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def python() -> str:
    """How to call this interpreter from here, also where its environment is not activated."""
    path = os.path.relpath(sys.executable)
    return "python" if path.startswith("..") else path


def peak_memory_mb() -> int:
    """The most memory this process held so far, in MB (10^6 bytes): on the GPU if there is one, else resident on the host."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def hardware() -> dict:
    """What the run ran on."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": names, "cpu_cores": os.cpu_count(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "platform": platform.platform()}


def visible(value):
    """`value` with every NaN or infinity spelt out, as JSON has no number for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible(item) for item in value]
    return value
