"""A user's mistake is told in one sentence, never as a traceback."""

import sys


class UserError(Exception):
    """What is wrong (naming the file, row or flag) and how to mend it, in one sentence."""


def install() -> None:
    """Make an uncaught `UserError`, or Ctrl-C, print a sentence and no traceback. The exit status is 1, as for any uncaught error."""
    previous = sys.excepthook

    def hook(kind, value, trace):
        if issubclass(kind, UserError):
            print(f"error: {value}", file=sys.stderr)
        elif issubclass(kind, KeyboardInterrupt):
            print("\ninterrupted (a training goes on from its last checkpoint with --resume_from_checkpoint)", file=sys.stderr)
        else:
            previous(kind, value, trace)

    sys.excepthook = hook
