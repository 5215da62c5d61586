"""A user's mistake is told in one sentence, never as a traceback; several processes that meet the same error show it once."""

import contextlib
import errno
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from recipes.common import processes
from recipes.common.redaction import redacted


class UserError(Exception):
    """What is wrong (naming the file, row or flag) and how to mend it, in one sentence."""


@contextlib.contextmanager
def writing(what: Path | str):
    """Turn a failure to write `what` into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # told below, with the name in question
            raise
        raise UserError(f"{what} can't be written ({error.strerror}): make room there or make it writable, and give the same command "
                        "again") from error


def check_writable(folder: Path) -> None:
    """Raise `UserError` unless something can be written into `folder`: before the work whose result is to be kept there."""
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0" * 4096)  # a disk that is full takes a name, and no content


def install() -> None:
    """Make an uncaught `UserError`, or Ctrl-C, print a sentence and no traceback. The exit status is 1, as for any uncaught error."""
    processes.quiet()
    processes.part_at_exit()
    sys.excepthook = _tell


def status_of(script: Callable[[], int]) -> int:
    """What `script` returns; 2 where a mistake of the user's ends it, which is told in a sentence: for a script whose exit status of 1
    says what it found."""
    install()
    try:
        return script()
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) and error.errno != errno.ENAMETOOLONG:
            raise
        _tell(type(error), error, error.__traceback__)
        return 2


def _tell(kind, value, trace) -> None:
    if issubclass(kind, UserError):
        text = f"error: {value}"
    elif issubclass(kind, KeyboardInterrupt):
        text = "\ninterrupted (a training goes on from its last checkpoint with --resume_from_checkpoint)"
    elif processes.lost(value):
        text = ("error: another process of this run ended or can't be reached; if it met an error, that is shown too "
                "(a training goes on from its last checkpoint with --resume_from_checkpoint)")
    elif isinstance(value, OSError) and value.errno == errno.ENAMETOOLONG:
        text = f"error: {str(value.filename)[:80]}... is too long for the name of a file: give a shorter one"
    else:
        text = "".join(traceback.format_exception(kind, value, trace))
    if not processes.first_to_tell(text):
        return
    # No hook that was there before this one is asked: it may be this one too, where a script runs a recipe, and would tell nothing.
    print(redacted(text), file=sys.stderr, flush=True)
