"""Data that don't come end a run with a sentence. Slow ones don't: whatever comes, be it a row, begins the time anew."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator

from recipes.common.errors import UserError

limit = 0  # --data_timeout, in seconds; 0: none
_waiting: tuple[int, str, str] | None = None  # the process whose time is running, what it waits for, and what to do later


@contextlib.contextmanager
def deadline(what: str, then: str = "start again"):
    """Raise `UserError` if nothing comes for `limit` seconds or the source fails, while `what` goes on; `then` is what to do later."""
    with _alarm_heard():
        begun = _begin(what, then)
        try:
            yield
        except (OSError, RuntimeError) as error:
            _tell(error, what, then)
        finally:
            if begun:
                _end()


def renew() -> None:
    """Something came: the time of the deadline that is running, if one is, begins anew."""
    if _runs():
        signal.setitimer(signal.ITIMER_REAL, limit)


def timed(items: Iterable, what: str, then: str = "start again") -> Iterator:
    """`items`, each of which has a deadline; what is done with them in between takes as long as it takes."""
    # As `deadline` around each, but that the alarm is listened for once: there may be a million rows.
    items, end = iter(items), object()
    with _alarm_heard():
        while True:
            begun = _begin(what, then)
            try:
                item = next(items, end)
            except (OSError, RuntimeError) as error:
                _tell(error, what, then)
            finally:
                if begun:
                    _end()
            if item is end:
                return
            yield item


@contextlib.contextmanager
def _alarm_heard():
    heard = limit and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, _late) if heard else None
    try:
        yield
    finally:
        if heard:
            signal.signal(signal.SIGALRM, before)


def _late(number, frame):
    _, what, then = _waiting
    raise UserError(f"{what}: the data did not come within {limit} s (--data_timeout): see whether their disk or server answers, then "
                    f"{then}")


def _runs() -> bool:
    return _waiting is not None and _waiting[0] == os.getpid()  # and not in a process that reads for this one


def _begin(what: str, then: str) -> bool:
    """Let the time run; False where there is no limit, or the time of a stream runs already while one of its files is read."""
    global _waiting
    if not limit or _runs() or threading.current_thread() is not threading.main_thread():
        return False
    _waiting = os.getpid(), what, then
    signal.setitimer(signal.ITIMER_REAL, limit)
    return True


def _end() -> None:
    global _waiting
    signal.setitimer(signal.ITIMER_REAL, 0)
    _waiting = None


def _tell(error: OSError | RuntimeError, what: str, then: str):
    if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
        raise error
    raise UserError(f"{what}: the data can't be read any more ({' '.join(str(error).split())[:200]}): when their source is back, "
                    f"{then}") from error
