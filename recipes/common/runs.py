"""The run folder: refused if it holds another run, filled with the model, run.json and report.html when training is done."""

import contextlib
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

from recipes.common import checkpoints, model_card, report, run_folder
from recipes.common.errors import UserError
from recipes.common.redaction import redacted
from recipes.common.wording import counted

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "rouge-score", "sacrebleu")
REPORTS = ("MODEL_CARD.md", "report.html")
SPEED = ("_runtime", "_per_second")  # what the Trainer adds to the scores of an evaluation


def start(shared, method, training) -> contextlib.ExitStack:
    """Seed everything, and take the output folder for this run alone until the returned context ends. Raises `UserError` if it holds
    another run or is written by one; ends the program if its run is finished. Leaves nothing behind where nothing was written."""
    folder, asked = Path(training.output_dir), training.resume_from_checkpoint
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"--output_dir {folder}: {existing} is {'a file' if existing.exists() else 'a link to nothing'}: name a folder")
    if asked:
        _leave_finished(folder, shared, method, training)
    named = Path(asked) if asked and asked.lower() != "true" else None
    if named and (wrong := checkpoints.fault(named) or checkpoints.without_optimizer(named)):
        raise UserError(f"--resume_from_checkpoint {asked}: {wrong}; --resume_from_checkpoint alone takes the newest whole one")
    with contextlib.ExitStack() as stack:
        if training.process_index == 0:
            try:
                tempfile.TemporaryDirectory(dir=existing).cleanup()
                stack.enter_context(run_folder.locked(folder))
            except OSError as error:
                raise UserError(f"--output_dir {folder} can't be written ({error.strerror}): name another folder") from None
        run_folder.check(folder, named, bool(asked), shared.from_scratch)
        if training.world_size > 1:
            torch.distributed.barrier()  # nothing is written before all have looked
        held = stack.pop_all()
    (enable_full_determinism if training.full_determinism else set_seed)(training.seed)
    _use_all_cores(training)
    if training.process_index == 0:
        precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
        step = f"{training.train_batch_size * training.gradient_accumulation_steps * training.world_size} rows"
        if shared.tokens_per_step:
            step = f"{shared.tokens_per_step} tokens"
        print(f"{Path(sys.argv[0]).stem}: {precision} on {training.device}, {step} a step, run folder {folder}")
    return held


def _leave_finished(folder: Path, shared, method, training) -> None:
    """End the program in good order if the run of `folder` is finished. Raises `UserError` if that was another run than is asked for."""
    path = folder / "run.json"
    if not path.exists():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = {"recipe": record["recipe"]} | record["shared_arguments"] | record["method_arguments"] | record["training_arguments"]
        steps = record["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--output_dir {folder}: its run.json is no finished run's, or damaged: name a new folder") from None
    now = {"recipe": Path(sys.argv[0]).stem} | asdict(shared) | asdict(method) | training.to_dict()
    now = json.loads(json.dumps(visible(redacted(now)), default=str))
    # What is only known, or was not yet known, when the rows are read.
    known = before.keys() & now.keys() - {name for name, by in (("max_length", shared.max_length is None), ("model", shared.start_from),
                                          ("num_train_epochs", shared.max_tokens), ("per_device_train_batch_size", shared.tokens_per_step))
                                          if by}
    if changed := checkpoints.differences(*({name: of[name] for name in known} for of in (before, now))):
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        last = checkpoints.newest(folder)[0]
        on = f", or train it further there with --resume_from_checkpoint {last} --allow_changed {','.join(changed)}" if last else ""
        raise UserError(f"--output_dir {folder} holds a finished run with other settings ({next(iter(changed.values()))}{more}): "
                        f"name a new folder{on}")
    if training.process_index == 0:
        print(f"{folder}: finished at step {steps}; nothing to do" + ("" if training.resume_from_checkpoint.lower() == "true" else
              f" (to go on from {training.resume_from_checkpoint}, name a new --output_dir)"))
    sys.exit(0)


def _use_all_cores(training) -> None:
    """Undo `accelerate launch`'s one thread for a lone process that turns out to have no GPU: it would take several times as long."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # what the launcher leaves behind
    if launched and training.device.type == "cpu" and training.world_size == 1 and torch.get_num_threads() == 1 < cores:
        torch.set_num_threads(cores)
        print(f"note: accelerate launch allows a lone process one thread; on this CPU it uses {cores}")


def steps(rows: int, training, an_epoch: int | None = None) -> int:
    """The optimizer steps that the Trainer will take on `rows` train rows; known before there is a Trainer.

    `an_epoch` is how many there are in an epoch, where --tokens_per_step decides it.
    """
    if training.max_steps > 0:
        return training.max_steps
    if an_epoch:
        return math.ceil(training.num_train_epochs * an_epoch)
    divide = math.floor if training.dataloader_drop_last else math.ceil
    batches = divide(divide(rows / training.train_batch_size) / training.world_size)
    each = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return math.ceil(training.num_train_epochs * each)


def checkpoint(training) -> str | None:
    """The checkpoint to resume from: the one named, or the newest of the run folder; None to start at the beginning. Raises `UserError`."""
    asked = training.resume_from_checkpoint
    if not asked:
        return None
    folder, named = Path(training.output_dir), None if asked.lower() == "true" else Path(asked)
    with training.main_process_first(desc="looking for a checkpoint"):  # it also clears away what others would see half of
        notes = checkpoints.tidy(folder) if training.process_index == 0 else []
        if named and named.resolve().parent != folder.resolve() and run_folder.continues(folder, named):
            notes, named = [*notes, f"{folder} went on from {named} already"], None
        newest, passed_over = (named, []) if named else checkpoints.newest(folder)
    if training.process_index == 0:
        for note in notes + passed_over:
            print(f"note: {note}")
        print(f"resuming from {newest}" if newest else f"{training.output_dir} holds no whole checkpoint: starting at step 0")
    if newest is None and any(checkpoints.fault(path) is None for path in checkpoints.found_in(folder)):
        raise UserError(f"--output_dir {folder}: its checkpoints were written with --save_only_model, so they hold no optimizer to go on "
                        "with: train under a new name")
    return str(newest) if newest else None


def finish(trainer, task, shared, method) -> None:
    """Score the dev rows with the final model, save it, write run.json and report.html, and say what to do next."""
    metrics = trainer.evaluate()
    training = trainer.args
    folder = Path(training.output_dir)
    staged = folder / checkpoints.STAGE / "model"
    with checkpoints.failure_told(folder / "model", folder, trainer.came_from):
        trainer.save_model(str(staged), _internal_call=True)
        if trainer.is_world_process_zero():
            if task.generation:
                task.generation.save_pretrained(staged)
            checkpoints.publish(staged, folder)
    if training.push_to_hub:
        trainer.push_to_hub(commit_message="Model save", revision=training.hub_revision)
    if not trainer.is_world_process_zero():
        return
    history = trainer.state.log_history
    # Those of all lives of the run, like the tokens; what a life did after its last checkpoint is in neither, as it was done again.
    seconds = trainer.watch.seconds + next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    parameters = list(trainer.model.parameters())
    record = {
        "recipe": Path(sys.argv[0]).stem,
        "task": task.name,
        "model": asdict(task.source),
        "command": command(training.world_size),
        "world_size": training.world_size,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": task.report,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(map(numbers_in, parameters)),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "resumes": trainer.watch.lives - 1,
        "tokens": trainer.state.num_input_tokens_seen,
        "tokens_per_second": round(trainer.state.num_input_tokens_seen / seconds, 1),
        "padding_share": round(trainer.padding_share, 4),
        "peak_memory_mb": peak_memory_mb(),
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "metrics": {f"dev_{key[5:]}": value for key, value in metrics.items() if key.startswith("eval_") and not key.endswith(SPEED)},
        **({"method_report": task.method_report} if task.method_report else {}),
        **({"lineage": task.lineage} if task.lineage else {}),
        **({"forgetting": trainer.forgetting} if trainer.forgetting else {}),
        **({"events": trainer.watch.events} if trainer.watch.events else {}),
        "method_arguments": asdict(method),
        "shared_arguments": asdict(shared),
        "training_arguments": training.to_dict(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": hardware(),
        "history": history,
    }
    if task.name == "pretrain":
        record["flops"] = flops(record["tokens"], record["trainable_parameters"], record["total_parameters"])
    with checkpoints.failure_told(folder / "run.json", folder, trainer.came_from):
        for name in REPORTS:
            if os.path.lexists(folder / name):
                checkpoints.set_aside(folder / name)
        write(folder, record)
        (folder / checkpoints.LIVES).unlink(missing_ok=True)
    trained, total = record["trainable_parameters"], record["total_parameters"]
    lives = f" (in {trainer.watch.lives} lives)" if trainer.watch.lives > 1 else ""
    print(f"\n{counted(record['steps'], 'steps')} in {seconds:.0f} s{lives}, {record['tokens_per_second']:.0f} tokens/s, "
          f"{100 * record['padding_share']:.1f} % padding, peak memory {record['peak_memory_mb'] / 1000:.1f} GB, {trained:,} of {total:,} "
          f"parameters trained ({100 * trained / total:.2f} %)")
    print(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in record["metrics"].items()))
    if "flops" in record:
        print(f"about {record['flops']:.2e} floating point operations for {record['tokens']:,} tokens")
    if trainer.forgetting:
        before, after = trainer.forgetting["before"], trainer.forgetting["after"]
        print("old rows, before -> after: "
              + ", ".join(f"{name.replace('_', ' ')} {before[name]:.4f} -> {after[name]:.4f}" for name in after))
    if not math.isfinite(metrics["eval_loss"]):
        raise UserError(f"the training diverged: its dev loss is {metrics['eval_loss']}; lower --learning_rate and train under a new name "
                        f"({folder} is kept for inspection)")
    print(f"saved in {folder}; next:\n  {python()} scripts/evaluate.py --run {folder} --base"
          + (f"\n  {python()} scripts/chat.py --run {folder}" if task.name == "chat" else ""))


def flops(tokens: int, trained: int, total: int) -> int:
    """Floating point operations of a training, about: 2 a parameter and token forward, 2 backward through every parameter, 2 more for the
    gradient of each one that is trained (Kaplan et al., 2020, arXiv:2001.08361, section 2.1: 6 N a token where all are).

    Not in it: attention scores, evaluations, and the further passes of --adversarial and --r_drop. The table of tokens counts as if
    it were multiplied, which it is where the output head shares it, on every token that is predicted.
    """
    return tokens * (4 * total + 2 * trained)


def numbers_in(parameter) -> int:
    """How many numbers a parameter stands for; bitsandbytes packs two numbers of 4 bits into one byte."""
    return parameter.quant_state.shape.numel() if type(parameter).__name__ == "Params4bit" else parameter.numel()


def write(folder: Path, record: dict) -> None:
    """Write the report and the model card that are made from `record`, and last run.json itself, each whole or not at all: a run folder
    with a run.json is complete. NaN stays visible, as a string; secrets don't."""
    record = redacted(record)
    library = "peft" if (folder / "adapter_config.json").is_file() else "transformers"
    texts = model_card.render(visible(record), library), report.render(record, record.get("report_language", "en"))
    for name, text in zip(REPORTS, texts, strict=True):
        checkpoints.write(folder / name, text)
    write_json(folder / "run.json", record)


def write_json(path: Path, record: dict) -> None:
    """Write `record` to `path`, whole or not at all. NaN and infinities become strings; secrets don't get in."""
    checkpoints.write(path, json.dumps(visible(redacted(record)), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


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
