"""A user's mistake is told in one sentence, never as a traceback; several processes that meet the same error show it once."""

import errno
import sys
import traceback

from recipes.common import processes
from recipes.common.redaction import redacted


class UserError(Exception):
    """What is wrong (naming the file, row or flag) and how to mend it, in one sentence."""


def install() -> None:
    """Make an uncaught `UserError`, or Ctrl-C, print a sentence and no traceback. The exit status is 1, as for any uncaught error."""
    processes.quiet()
    processes.part_at_exit()
    sys.excepthook = _tell


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
