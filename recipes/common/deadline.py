"""Data that don't come end a run with a sentence. Slow ones don't: whatever comes, be it a row, begins the time anew."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator

from recipes.common.errors import UserError

limit = 0  # --data_timeout, in seconds; 0: none
_process = None  # the process whose time is running


@contextlib.contextmanager
def deadline(what: str, then: str = "start again"):
    """Raise `UserError` if nothing comes for `limit` seconds or the source fails, while `what` goes on; `then` is what to do later."""
    global _process

    def late(number, frame):
        raise UserError(f"{what}: the data did not come within {limit} s (--data_timeout): see whether their disk or server answers, then "
                        f"{then}")

    outer = _process is not None and _process == os.getpid()  # a file that is read while a stream is: its time runs already
    timed = limit and not outer and threading.current_thread() is threading.main_thread()
    if timed:
        before, _process = signal.signal(signal.SIGALRM, late), os.getpid()
        renew()
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise UserError(f"{what}: the data can't be read any more ({' '.join(str(error).split())[:200]}): when their source is back, "
                        f"{then}") from error
    finally:
        if timed:
            _process = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def renew() -> None:
    """Something came: the time of the deadline that is running, if one is, begins anew."""
    if _process is not None and _process == os.getpid():  # and not in a process that reads for this one
        signal.setitimer(signal.ITIMER_REAL, limit)


def timed(items: Iterable, what: str, then: str = "start again") -> Iterator:
    """`items`, each of which has a deadline; what is done with them in between takes as long as it takes."""
    items, end = iter(items), object()
    while True:
        with deadline(what, then):
            item = next(items, end)
        if item is end:
            return
        yield item
