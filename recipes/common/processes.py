"""Several processes that train or score together, as a launcher (torchrun, accelerate launch, srun) starts them.

Only the first one, rank 0, prints. An error is shown once, whichever ranks it meets. A launcher says who a process is in environment
variables (docs.pytorch.org/docs/stable/elastic/run.html), so all of this is known before torch is imported.
"""

import atexit
import gc
import hashlib
import os
import re
import socket
import sys
import time
import warnings
from datetime import timedelta

PATIENCE = 5  # seconds
NAMED = 8  # ranks that a sentence names
LOST = re.compile(r"gloo|NCCL|Connection (?:closed|reset)|Socket Timeout|Broken pipe", re.I)
_kept = []  # the store of the meeting, which must live as long as the process


def rank() -> int:
    """The number of this process, from 0."""
    return _number("RANK", 0)


def count() -> int:
    """How many processes were started together."""
    return _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default  # args.check_launch refuses anything else


def quiet() -> None:
    """Let no rank but the first one print, warn, or show a progress bar; what it writes to stderr itself still appears."""
    if rank() == 0:
        return
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # stays open as long as the process
    warnings.simplefilter("ignore")
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}


def part_at_exit() -> None:
    """Let this process leave its group before the interpreter ends, whatever ends it.

    A thread of gloo lets go of the tensors that it exchanged a moment after the exchange. If the interpreter is ending by then, that
    thread is stopped within a destructor, and the process aborts (SIGABRT, "terminate called without an active exception").
    """
    if count() > 1:
        atexit.register(_part)


def _part() -> None:
    distributed = sys.modules.get("torch.distributed")  # not imported if the command line was refused
    if distributed and distributed.is_initialized():
        # An error that ended the process holds on to all that its functions held (sys.last_exc since Python 3.12).
        sys.last_type = sys.last_value = sys.last_traceback = sys.last_exc = None
        gc.collect()  # a model wrapped for the group holds on to the group, and is itself held in a circle with its trainer
        distributed.destroy_process_group()


def first_to_tell(sentence: str) -> bool:
    """Whether no other rank has told this yet, in this life of the group.

    Without torchrun (or accelerate launch, which uses it) the ranks can't ask each other: then rank 0 tells at once, and the others after
    some seconds, in which the launcher ends them if rank 0 failed too (srun --kill-on-bad-exit).
    """
    if count() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        time.sleep(PATIENCE if rank() else 0)
        return True
    if count() == 1:
        return True
    from torch.distributed import TCPStore

    name = f"told/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{hashlib.sha256(sentence.encode()).hexdigest()}"
    try:  # the launcher's own store, which outlives every rank
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5))
        return store.add(name, 1) == 1
    except RuntimeError:
        return True


def lost(error: BaseException) -> bool:
    """Whether `error` only says that another process of the group is gone."""
    return count() > 1 and isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def all_there(seconds: int) -> str | None:
    """Wait until every rank has come to the meeting place (MASTER_ADDR, MASTER_PORT), and say what is wrong if that can't be.

    Left alone, torch would wait for half an hour, and then name no rank. torchrun and accelerate launch see to it themselves.
    """
    if count() == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    address, port, end = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), time.monotonic() + seconds
    while rank() and (silent := _silent(address, port)):  # torch would wait as well, and print stacks of C++ meanwhile
        if time.monotonic() > end:
            return (f"RANK 0 does not answer at {address}:{port} ({silent}; it was waited for {seconds} s): start one process for each "
                    f"RANK from 0 to {count() - 1}, with a MASTER_ADDR that all can reach")
        time.sleep(0.2)
    from torch.distributed import TCPStore

    try:
        store = TCPStore(address, port, is_master=rank() == 0, wait_for_workers=False, multi_tenant=True)  # torch's own will be this one
    except RuntimeError:
        return f"{address}:{port} is taken, by another run or by a second process with RANK 0: set another MASTER_PORT"
    own = f"{socket.gethostname()}, process {os.getpid()}"
    twin = store.compare_set(f"here/{rank()}", "", own).decode()
    if twin != own:
        return f"two processes call themselves RANK {rank()} ({twin} and {own}): number them from 0 to {count() - 1}"
    missing = list(range(count()))
    while missing := [other for other in missing if not store.check([f"here/{other}"])]:
        if time.monotonic() > end:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            return (f"of {count()} processes, RANK {', '.join(map(str, missing[:NAMED]))}{more} did not come to {address}:{port} within "
                    f"{seconds} s: start one for each RANK")
        time.sleep(0.2)
    _kept.append(store)
    return None


def _silent(address: str, port: int) -> str | None:
    """Why nobody answers at this address, or None if somebody does."""
    try:
        socket.create_connection((address, port), timeout=PATIENCE).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def meet() -> None:
    """Form the group of the ranks of a script that does no training, each on a GPU of its own where there are several."""
    if count() == 1:
        return
    import torch

    torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))  # what is exchanged are Python objects; nobody waits in vain
    if torch.accelerator.device_count() > 1:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))


def share(items: int) -> range:
    """Which of so many items are this rank's: neighbours stay together, as the turns of a dialogue are cheaper together."""
    return range(items * rank() // count(), items * (rank() + 1) // count())


def joined(own: list) -> list:
    """What all ranks have for their shares, in the order of the items, each once, on every rank."""
    if count() == 1:
        return own
    from torch import distributed

    parts = [None] * count()
    distributed.all_gather_object(parts, own)
    return [result for part in parts for result in part]


def divided(write, items: list) -> tuple[list[str], int]:
    """`write(items)`, which gives a text for each item and a count, with the items divided among the ranks. All get the whole."""
    texts, counted = write([items[i] for i in share(len(items))])
    return joined(texts), sum(joined([counted]))
