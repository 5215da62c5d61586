"""Checkpoints that are whole or not there, and are checked before a run goes on from one.

A checkpoint is written into `unfinished/` of the run folder. Every file is fsynced; manifest.json, which lists the files with sizes and
SHA-256 and says what the run was asked for, comes last; one rename puts the folder in its place. So whatever ends the process, at whatever
moment, `checkpoint-N` is either complete or absent, and a file that was cut short or changed since then is noticed.
"""

import contextlib
import errno
import filecmp
import hashlib
import itertools
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
START = "start"  # folder of the run folder with the model that a run from scratch began with
ASKED = "from_scratch.json"  # file in it that says what it was made of
STAGED = re.compile(rf"(old-)?checkpoint-\d+|model|{START}")  # what stands in it; anything else is not ours, and is left alone
LIVES = "_lives"  # how often a run that is not finished was started; the Hub's upload leaves out names that begin like this
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch.save says of a disk that is full, as it fails in the middle, at the end, and in closing what it could not end.
TORCH_WRITES = ("PytorchStreamWriter", "file write failed", "iostream error", "inline_container")

# What a run may be asked otherwise when it goes on: these say where to write and what to show, never what is learned. `data` is here as
# the rows are compared, wherever they lie.
FREE = {"data", "fallback_model", "allow_changed", "repeats", "on_nan", "data_timeout", "output_dir", "resume_from_checkpoint",
        "save_total_limit", "save_only_model", "report_to", "run_name", "project", "disable_tqdm", "log_level", "log_level_replica",
        "log_on_each_node", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter",
        "include_num_input_tokens_seen", "debug", "do_train", "do_eval", "do_predict", "skip_memory_metrics", "torch_empty_cache_steps",
        "ddp_timeout", "local_rank", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "preprocessing_num_workers", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token",
        "hub_private_repo", "hub_always_push", "hub_revision", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}
FIRST = ("recipe", "task", "model")  # of what differs, what is named first
NEVER = {"optim", "optim_args"}  # what no --allow_changed allows: the checkpoint holds another optimizer's state


def step_of(folder: Path) -> int:
    """The optimizer step that a folder checkpoint-N is of; -1 for any other name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else -1


def put_in_place(staged: Path, folder: Path, asked: dict, came_from: Path | None = None) -> Path:
    """Complete the checkpoint `staged`, in the stage of the run folder `folder`, and rename it to where it belongs, which is returned.

    `came_from` is the checkpoint of another run folder from which this run went on."""
    files = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        files[path.relative_to(staged).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path)}
        _sync(path)
    manifest = {"step": step_of(staged), "came_from": str(came_from.resolve()) if came_from else None, "files": files, "asked": asked}
    (staged / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
    for path in (staged / MANIFEST, *(path for path in staged.rglob("*") if path.is_dir()), staged, staged.parent):
        _sync(path)
    return _move(staged, folder)


def _move(staged: Path, folder: Path) -> Path:
    target = folder / staged.name
    if os.path.lexists(target):
        if fault(target, contents=False) is None:  # that of the same step before the epoch's end
            _discard(target)  # a kill between the two renames is mended by tidy
        else:
            set_aside(target)
    os.rename(staged, target)
    _sync(folder)
    clear(folder)
    return target


def publish(staged: Path, folder: Path) -> None:
    """Move every file of `staged`, in the stage of the run folder `folder`, to its place there; what stood there is set aside unless it is
    the same."""
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        target = folder / path.relative_to(staged)
        _sync(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target) and not (target.is_file() and filecmp.cmp(path, target, shallow=False)):
            set_aside(target)
        os.replace(path, target)
    _sync(folder)
    clear(folder)


def set_aside(path: Path) -> Path:
    """Rename what stands where a run has to write, and may be all that a user has, to a name that nobody writes; says so."""
    aside = next(name for n in itertools.count(1) if not os.path.lexists(name := path.with_name(f"{path.name}.set-aside-{n}")))
    os.rename(path, aside)
    print(f"note: {path} was there already: it is now {aside.name}")
    return aside


def write(path: Path, text: str) -> None:
    """Write `text` to `path` so that it is there whole or not at all, whatever ends the process or the machine."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def count_life(folder: Path, before: int, fresh: bool) -> int:
    """The number of this life of a run, from 1; `before` is that of the life that wrote the checkpoint it goes on from, 0 for none.

    It is kept in a file, as a life may end before its first checkpoint. A `fresh` run doesn't ask what lived in its folder before."""
    path = folder / LIVES
    life = max(before, 0 if fresh or not path.is_file() else int(path.read_text(encoding="utf-8"))) + 1
    write(path, f"{life}\n")
    return life


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint so that no half of it is ever seen under its name."""
    away = checkpoint.parent / STAGE / f"old-{checkpoint.name}"
    _delete(away)
    away.parent.mkdir(exist_ok=True)
    os.rename(checkpoint, away)
    _sync(checkpoint.parent)


def clear(folder: Path) -> None:
    """Delete what a run has in its stage, and the stage unless something else is in it."""
    for path in (folder / STAGE).glob("*"):
        if STAGED.fullmatch(path.name):
            _delete(path)
    with contextlib.suppress(OSError):
        (folder / STAGE).rmdir()


def _delete(path: Path) -> None:
    if path.is_symlink():  # what it points to is not ours to delete
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def fault(checkpoint: Path, contents: bool = True) -> str | None:
    """Why a run can't go on from `checkpoint`, or None. Without `contents`, only names and sizes of the files are looked at."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so its writing was interrupted, or another program wrote it"
    try:
        manifest = read_manifest(checkpoint)
        wanted = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        step = {**manifest["asked"], "step": manifest["step"]}["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    if step_of(checkpoint) not in (-1, step):
        return f"it was written as checkpoint-{step}, and renamed"
    if outside := [name for name in wanted if Path(name).is_absolute() or ".." in Path(name).parts]:
        return f"its {MANIFEST} names {outside[0]}, which is outside of it"
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} - {MANIFEST}
    for name in sorted(wanted.keys() | there):
        if name not in there:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} was put there later"
        size = (checkpoint / name).stat().st_size
        if size != wanted[name][0]:
            return f"{name} has {size:,} bytes where {wanted[name][0]:,} were written"
        try:
            if contents and _digest(checkpoint / name) != wanted[name][1]:
                return f"{name} was changed since it was written (its SHA-256 is another)"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
    return None


def read_manifest(checkpoint: Path) -> dict:
    """The manifest of a checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def origin(checkpoint: Path) -> str | None:
    """The checkpoint of another folder that the run of `checkpoint` went on from, "" for none; None if no run of ours wrote this one."""
    try:
        manifest = read_manifest(checkpoint)
        return {**manifest["asked"], "came_from": manifest.get("came_from") or ""}["came_from"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def without_optimizer(checkpoint: Path) -> str | None:
    """Why a training can't go on from a checkpoint that is whole, or None."""
    if any(name.startswith(("optimizer", "scheduler", "rng_state")) for name in read_manifest(checkpoint)["files"]):
        return None
    return "it was written with --save_only_model, so it holds no optimizer to go on with"


def found_in(folder: Path) -> list[Path]:
    """What is named as a checkpoint in a run folder, whole or not, the newest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of, reverse=True)


def newest(folder: Path, up_to: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run folder, of step `up_to` or before, that a run can go on from, and a sentence on each newer one that
    was passed over."""
    passed_over = []
    for path in found_in(folder):
        if up_to is not None and step_of(path) > up_to:
            continue
        wrong = fault(path) or without_optimizer(path)
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
    clear(folder)
    return notes


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit` (None or 0: no limit), never the last whole one, the last one with an optimizer, or the
    `best`.

    Damaged ones don't count and are left alone: they may be all that a user has.
    """
    whole = [path for path in reversed(found_in(folder)) if fault(path, contents=False) is None]
    kept = {*whole[-1:], *[path for path in whole if without_optimizer(path) is None][-1:],
            *(path for path in whole if best and path.name == Path(best).name)}
    for path in [path for path in whole if path not in kept][: max(0, len(whole) - max(limit, len(kept)))] if limit else ():
        _discard(path)
    clear(folder)


def asked_for(recipe: str, task, shared: dict, method: dict, training) -> dict:
    """Everything that decides what a run learns, by name, as it stands in a manifest."""
    fingerprint = {}
    for split, counts in task.report.get("splits", {}).items():
        # What is counted of a stream grows while it is read.
        names = ("source",) if shared.get("streaming") and split == "train" else ("sha256", "rows", "kept", "tokens", "supervised")
        fingerprint[split] = {name: counts.get(name) for name in names}
    every = training.to_dict() | shared | method | {
        "model": _named(asdict(task.source)), "recipe": recipe, "rows": fingerprint, "world_size": training.world_size}
    return json.loads(json.dumps({name: value for name, value in every.items() if name not in FREE}, default=str))


def _named(source: dict) -> str:
    """A name for the model (models.Source as a dict) that stays the same when a run is repeated or moved: one from scratch stands in the
    run folder."""
    if source.get("from_scratch"):
        return source["requested"]
    return source["used"] + (f" at {source['revision']}" if source["revision"] else "")


def differences(before: dict, now: dict) -> dict[str, str]:
    """A phrase on each name that `before` and `now` say something else of, by name; the recipe, the task and the model come first."""
    names = [name for name in sorted(before.keys() | now.keys(), key=lambda name: (name not in FIRST, name))
             if before.get(name) != now.get(name) and name not in FREE]
    return {name: f"{name} was {before.get(name)}, now {now.get(name)}" for name in names}


def check_unchanged(checkpoint: Path, asked: dict, allowed: str | None) -> dict[str, str]:
    """Compare what a run is asked now with what it was asked when it wrote `checkpoint`; returns a phrase on each allowed change, by name.

    Raises `UserError` for any other change, and for names in `allowed` (separated by commas) that are none.
    """
    before, names = read_manifest(checkpoint)["asked"], {name for name in (allowed or "").split(",") if name}
    before = {"recipe": asked.get("recipe")} | before  # manifests of earlier versions don't say it
    if unknown := sorted(names - asked.keys() - before.keys()):
        raise UserError(f"--allow_changed {unknown[0]}: no argument of that name is compared; name a flag without its dashes, or rows")
    phrases = differences(before, asked)
    if "rows" in phrases:
        splits = [split for split in before["rows"].keys() | asked["rows"] if before["rows"].get(split) != asked["rows"].get(split)]
        phrases["rows"] = f"the {' and '.join(sorted(splits))} data are others"
    if never := [name for name in phrases if name in NEVER]:
        raise UserError(f"{checkpoint} holds the state of another optimizer ({phrases[never[0]]}), which --allow_changed can't allow: "
                        f"leave --{never[0]} as it was, or train under a new name")
    if refused := [name for name in phrases if name not in names]:
        more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise UserError(f"{checkpoint} was written with other settings ({phrases[refused[0]]}{more}): resume with the recipe, flags and "
                        f"data that wrote it, or allow the change by name: --allow_changed {','.join(sorted(names | set(refused)))}")
    return phrases


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


def last_whole(folder: Path, came_from: Path | None = None, up_to: int | None = None) -> Path | None:
    """The newest checkpoint that the run of `folder` can go on from; before its own first one, that of another folder that it came from."""
    last = newest(folder, up_to)[0]
    return last or (came_from if came_from and fault(came_from) is None else None)


def _way_on(folder: Path, came_from: Path | None) -> str:
    last = last_whole(folder, came_from)
    if last is None:
        return "no checkpoint was written yet"
    return f"{last} is whole: go on from it with --resume_from_checkpoint" + (f" {last}" if last == came_from else "")


@contextlib.contextmanager
def failure_told(what: Path, folder: Path, came_from: Path | None = None):
    """Turn a failure to write `what` into the run folder `folder` into a `UserError`; a half of it is removed."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer tells no number; a disk that is full shows it. Any other RuntimeError is no matter of writing.
        writing = not isinstance(error, RuntimeError) or any(sign in str(error) for sign in TORCH_WRITES)
        if not writing:
            raise
        clear(folder)
        text = " ".join(str(error).split())[:200]
        full = getattr(error, "errno", None) in FULL or re.search(r"(code:|os error) (28|122|27)\b|No space left", text)
        reason = "the disk is full" if full or isinstance(error, RuntimeError) else getattr(error, "strerror", None) or text
        raise UserError(f"{what} can't be written ({reason}): make room or make the folder writable; "
                        f"{_way_on(folder, came_from)}") from error


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
