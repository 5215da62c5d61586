"""Several processes that train or score together, as a launcher (torchrun, accelerate launch, srun) starts them.

Only the first one, rank 0, prints. An error is shown once, whichever ranks it meets. A launcher says who a process is in environment
variables (docs.pytorch.org/docs/stable/elastic/run.html), so all of this is known before torch is imported.
"""

import hashlib
import os
import re
import sys
import warnings
from datetime import timedelta

LOST = re.compile(r"gloo|NCCL|Connection (?:closed|reset)|Socket Timeout|Broken pipe", re.I)


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def quiet() -> None:
    """Let no rank but the first one print, warn, or show a progress bar; what it writes to stderr itself still appears."""
    if rank() == 0:
        return
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115: open as long as the process
    warnings.simplefilter("ignore")
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}


def first_to_tell(sentence: str) -> bool:
    """Whether no other rank has told this yet, in this life of the group. Where the ranks can't ask each other, all of them tell."""
    if count() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
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


def share(items: list) -> list:
    """Every count-th item, beginning with this rank's number: its part of work that is the same on all ranks."""
    return items[rank():: count()]


def joined(own: list, items: int) -> list:
    """The results of all ranks for all `items`, each once and in their order, from this rank's for `share(items)`."""
    if count() == 1:
        return own
    from torch import distributed

    parts = [None] * count()
    distributed.all_gather_object(parts, own)
    whole = [None] * items
    for number, part in enumerate(parts):
        whole[number:: count()] = part
    return whole
