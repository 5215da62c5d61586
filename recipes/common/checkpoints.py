"""Checkpoints that are whole or not there, and are checked before a run goes on from one.

A checkpoint is written into `unfinished/` of the run folder. Every file is fsynced; manifest.json, which lists the files with sizes and
SHA-256 and says what the run was asked for, comes last; one rename puts the folder in its place. So whatever ends the process, at whatever
moment, `checkpoint-N` is either complete or absent, and a file that was cut short or changed since then is noticed.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError

from recipes.common.errors import UserError

MANIFEST = "manifest.json"
STAGE = "unfinished"  # folder of the run folder in which checkpoints are written, and into which they are moved to be deleted
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What a run may be asked otherwise when it goes on: these say where to write and what to show, never what is learned. `data` is here as
# the rows are compared, wherever they lie.
FREE = {"data", "fallback_model", "allow_changed", "repeats", "on_nan", "data_timeout", "output_dir", "resume_from_checkpoint",
        "save_total_limit", "report_to", "run_name", "project", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node",
        "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "include_num_input_tokens_seen", "debug",
        "do_train", "do_eval", "do_predict", "skip_memory_metrics", "torch_empty_cache_steps", "ddp_timeout", "local_rank",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
        "preprocessing_num_workers", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push",
        "hub_revision", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}


def step_of(folder: Path) -> int:
    """The optimizer step that a folder checkpoint-N is of; -1 for any other name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else -1


def put_in_place(staged: Path, folder: Path, asked: dict) -> Path:
    """Complete the checkpoint `staged`, in the stage of the run folder `folder`, and rename it to where it belongs, which is returned."""
    files = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        files[path.relative_to(staged).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path)}
        _sync(path)
    (staged / MANIFEST).write_text(json.dumps({"step": step_of(staged), "files": files, "asked": asked}, ensure_ascii=False, indent=1),
                                   encoding="utf-8")
    for path in (staged / MANIFEST, *(path for path in staged.rglob("*") if path.is_dir()), staged, staged.parent):
        _sync(path)
    return _move(staged, folder)


def _move(staged: Path, folder: Path) -> Path:
    target = folder / staged.name
    if target.exists():  # a damaged one, or that of the same step before the epoch's end; a kill between the two renames is mended by tidy
        _discard(target)
    os.rename(staged, target)
    _sync(folder)
    shutil.rmtree(folder / STAGE, ignore_errors=True)
    return target


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint so that no half of it is ever seen under its name."""
    away = checkpoint.parent / STAGE / f"old-{checkpoint.name}"
    shutil.rmtree(away, ignore_errors=True)
    away.parent.mkdir(exist_ok=True)
    os.rename(checkpoint, away)
    _sync(checkpoint.parent)


def fault(checkpoint: Path, contents: bool = True) -> str | None:
    """Why a run can't go on from `checkpoint`, or None. Without `contents`, only names and sizes of the files are looked at."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so its writing was interrupted, or another program wrote it"
    try:
        wanted = {name: (entry["size"], entry["sha256"]) for name, entry in read_manifest(checkpoint)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} - {MANIFEST}
    for name in sorted(wanted.keys() | there):
        if name not in there:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} was put there later"
        size = (checkpoint / name).stat().st_size
        if size != wanted[name][0]:
            return f"{name} has {size:,} bytes where {wanted[name][0]:,} were written"
        if contents and _digest(checkpoint / name) != wanted[name][1]:
            return f"{name} was changed since it was written (its SHA-256 is another)"
    return None


def read_manifest(checkpoint: Path) -> dict:
    """The manifest of a checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run folder that a run can go on from, and a sentence on each newer one that was passed over."""
    passed_over = []
    for path in sorted(filter(lambda path: step_of(path) >= 0, folder.glob("checkpoint-*")), key=step_of, reverse=True):
        wrong = fault(path)
        if wrong is None:
            return path, passed_over
        passed_over.append(f"{path} is passed over: {wrong}")
    return None, passed_over


def tidy(folder: Path) -> list[str]:
    """Finish or remove what a killed process left in the stage of a run folder; says what it did."""
    notes = []
    for path in sorted((folder / STAGE).glob("*")):
        if step_of(path) >= 0 and fault(path) is None:
            notes.append(f"{_move(path, folder)} was whole but not yet in its place: moved there")
        elif step_of(path) >= 0:
            notes.append(f"{path} is removed: its writing was interrupted")
    shutil.rmtree(folder / STAGE, ignore_errors=True)
    return notes


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit` (None or 0: no limit), never the last whole one nor the `best`.

    Damaged ones don't count and are left alone: they may be all that a user has.
    """
    found = sorted(folder.glob("checkpoint-*"), key=step_of)
    whole = [path for path in found if step_of(path) >= 0 and fault(path, contents=False) is None]
    kept = {whole[-1], *(path for path in whole if best and path.name == Path(best).name)} if whole else set()
    for path in [path for path in whole if path not in kept][: max(0, len(whole) - max(limit, len(kept)))] if limit else ():
        _discard(path)
    shutil.rmtree(folder / STAGE, ignore_errors=True)


def asked_for(task, shared: dict, method: dict, training) -> dict:
    """Everything that decides what a run learns, by name, as it stands in a manifest."""
    fingerprint = {}
    for split, counts in task.report.get("splits", {}).items():
        # What is counted of a stream grows while it is read.
        names = ("source",) if shared.get("streaming") and split == "train" else ("sha256", "rows", "kept", "tokens", "supervised")
        fingerprint[split] = {name: counts.get(name) for name in names}
    every = training.to_dict() | shared | method | {
        "model": _named(asdict(task.source)), "rows": fingerprint, "world_size": training.world_size}
    return json.loads(json.dumps({name: value for name, value in every.items() if name not in FREE}, default=str))


def _named(source: dict) -> str:
    """A name for the model (models.Source as a dict) that stays the same when a run is repeated or moved: one from scratch stands in the
    run folder."""
    if source.get("from_scratch"):
        return source["requested"]
    return source["used"] + (f" at {source['revision']}" if source["revision"] else "")


def check_unchanged(checkpoint: Path, asked: dict, allowed: str | None) -> list[str]:
    """Compare what a run is asked now with what it was asked when it wrote `checkpoint`; returns the allowed changes, a phrase each.

    Raises `UserError` for any other change, and for names in `allowed` (separated by commas) that are none.
    """
    before, names = read_manifest(checkpoint)["asked"], {name for name in (allowed or "").split(",") if name}
    if before.get("save_only_model"):
        raise UserError(f"{checkpoint} was written with --save_only_model, so it holds no optimizer to go on with: train under a new name")
    if unknown := sorted(names - asked.keys() - before.keys()):
        raise UserError(f"--allow_changed {unknown[0]}: no argument of that name is compared; name a flag without its dashes, or rows")
    phrases = {}
    for name in sorted(name for name in before.keys() | asked.keys() if before.get(name) != asked.get(name)):
        phrases[name] = f"{name} was {before.get(name)}, now {asked.get(name)}"
        if name == "rows":
            splits = [split for split in before["rows"].keys() | asked["rows"] if before["rows"].get(split) != asked["rows"].get(split)]
            phrases[name] = f"the {' and '.join(sorted(splits))} data are others"
    if refused := sorted(phrases.keys() - names):
        more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise UserError(f"{checkpoint} was written with other settings ({phrases[refused[0]]}{more}): resume with the recipe, flags and "
                        f"data that wrote it, or allow the change by name: --allow_changed {','.join(sorted(names | set(refused)))}")
    return list(phrases.values())


def changed_since(path: Path, asked: dict) -> list[str]:
    """A sentence on each split, and the model, that is another than in the run.json `path`, though the run is to repeat that one."""
    record = json.loads(path.read_text(encoding="utf-8"))
    before, now = record["data"]["splits"], asked["rows"]
    found = [f"the {split} data are not those of {path}" for split in sorted(before.keys() | now)
             if split not in now or any(before.get(split, {}).get(name) != value for name, value in now[split].items())]
    if record.get("world_size", asked["world_size"]) != asked["world_size"]:  # args.py has refused it, unless it was allowed
        found.append(f"{path} is of {record['world_size']} processes, and this run is of {asked['world_size']}: another order of rows, and "
                      "other sums")
    was = _named(record["model"])
    return found + ([f"the model is {asked['model']}, not {was} as in {path}"] if was != asked["model"] else [])


@contextlib.contextmanager
def failure_told(what: Path, folder: Path):
    """Turn a failure to write `what` into the run folder `folder` into a `UserError`; a checkpoint's half is removed."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer tells no number; a disk that is full shows it. Any other RuntimeError is no matter of writing.
        writing = not isinstance(error, RuntimeError) or "PytorchStreamWriter" in str(error) or "file write failed" in str(error)
        if not writing:
            raise
        shutil.rmtree(folder / STAGE, ignore_errors=True)
        text = " ".join(str(error).split())[:200]
        full = getattr(error, "errno", None) in FULL or re.search(r"code: (28|122|27)\b|No space left", text)
        reason = "the disk is full" if full or isinstance(error, RuntimeError) else getattr(error, "strerror", None) or text
        last = newest(folder)[0]
        rest = f"{last} is whole: go on from it with --resume_from_checkpoint" if last else "no checkpoint was written yet"
        raise UserError(f"{what} can't be written ({reason}): make room or make the folder writable; {rest}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
