"""Whose a run folder is: one training at a time writes into it, and what another program or another run has there is left alone."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from recipes.common import checkpoints
from recipes.common.checkpoints import ASKED, START
from recipes.common.errors import UserError

LOCK = "_running.lock"  # the Hub's upload leaves out names that begin like this


@contextlib.contextmanager
def locked(folder: Path):
    """Make the run folder and hold its lock. Raises `UserError` that names the holder, if another process has it.

    A POSIX lock: the kernel frees it when the process ends, however it ends, and the processes that read its data don't inherit it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):  # something was written
            for path in made:
                path.rmdir()


def _lock(path: Path):
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as systems differ
            file.seek(0)
            holder = file.read().strip() or "a process that has just begun"
            raise UserError(f"--output_dir {path.parent}: another training writes there ({holder}): wait for its end, or name another "
                            "folder") from None
        except OSError as error:
            print(f"note: {path.parent} lies on a disk without locks ({error.strerror}): start no second training that writes there")
        if _same(file, path):
            break
        file.close()  # its holder removed it between the two calls
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _same(file, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def check(folder: Path, named: Path | None, resume: bool, from_scratch: bool) -> None:
    """Raise `UserError` where a run folder holds what is not this run's. `named` is the checkpoint that a resume names, if it does."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # "runs", the TensorBoard events, is all that a run leaves when it ends before its first checkpoint; from scratch, "start" as well.
    others = names - {"runs", LOCK, checkpoints.LIVES, *([START] if from_scratch and (folder / START / ASKED).is_file() else [])}
    found, stage = checkpoints.found_in(folder), folder / checkpoints.STAGE
    if not resume:
        if found or "run.json" in names or stage.exists():
            raise UserError(f"--output_dir {folder} holds another run: choose a new name (with make: OUT=runs/NAME), "
                            "or continue it with --resume_from_checkpoint")
        _refuse(folder, others)
        return
    if stage.exists():
        _refuse(folder, {path.name for path in stage.iterdir() if not checkpoints.STAGED.fullmatch(path.name)}, f"{stage.name}/")
    own = [path for path in found if checkpoints.origin(path) is not None]
    if not own:  # no run of ours that could be gone on with
        _refuse(folder, others - {stage.name})
    elif named and named.resolve().parent != folder.resolve() and not continues(folder, named):
        raise UserError(f"--output_dir {folder} holds another run than {named}: name a new folder, or continue that run with "
                        "--resume_from_checkpoint alone")


def _refuse(folder: Path, others: set[str], below: str = "") -> None:
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(f"--output_dir {folder} holds files that are no run's ({below}{min(others)}{more}), which could be overwritten: "
                        "name a new folder")


def continues(folder: Path, named: Path) -> bool:
    """Whether all checkpoints of a run folder are of a run that went on from the checkpoint `named` of another folder: as when the same
    command is given once more after a kill."""
    origins = [checkpoints.origin(path) for path in checkpoints.found_in(folder)]
    return any(origins) and set(origins) - {None} == {str(named.resolve())}
