"""torch.compile for training, block by block.

The Trainer would compile the whole model: then each kind of batch compiles everything anew, and what this project does around the
blocks (the head on supervised positions, masks made from the batch) breaks the graph in many places. Here each block is compiled in place,
with shapes that may vary, as the groups of rows do (batches.py), and blocks that are alike share what was compiled. Names of parameters,
files and checkpoints are those of the model as it is. Evaluation and generation run uncompiled: compiling them too would cost more than it
saves.
"""

import contextlib
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from recipes.common import cpu_attention
from recipes.common.errors import UserError

NOTE = ("torch.compile works for a minute or more on each new kind of batch (one row or several, padded or not); the section "
        "\"torch.compile: when it pays\" of docs/benchmarks.md says how many steps it takes to win that back")
# Compilations of one piece of code: where blocks differ (a layer's number, T5's first block), each has its own. PyTorch's own limit of 8
# would leave the rest of a deep model as it is.
COMPILATIONS = 1024


def check(training) -> None:
    """Raise `UserError` where --torch_compile can't work with these flags or on this machine."""
    backend, mode = training.torch_compile_backend, training.torch_compile_mode
    backends = torch._dynamo.list_backends(exclude_tags=())
    if backend not in backends:
        raise UserError(f"--torch_compile_backend {backend}: PyTorch has {', '.join(backends)} here; inductor is the default")
    if mode is not None and backend != "inductor":
        raise UserError(f"--torch_compile_mode is for the backend inductor: leave it out, or leave out --torch_compile_backend {backend}")
    modes = ("default", *torch._inductor.list_mode_options())
    if mode is not None and mode not in modes:
        raise UserError(f"--torch_compile_mode {mode}: there are {', '.join(modes)}")
    if training.activation_checkpointing or training.gradient_checkpointing:
        raise UserError("--torch_compile compiles blocks whose activations are kept, and --activation_checkpointing computes them again: "
                        "leave one of them out")
    if any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1") for name in ("FSDP", "DEEPSPEED")) \
            or training.fsdp or training.deepspeed:
        raise UserError("--torch_compile was never tried with FSDP or DeepSpeed, which divide the blocks: leave it out")
    if backend == "inductor" and training.device.type == "cpu":
        _check_compiler()


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")  # what inductor calls
    if shutil.which(compiler) is None:
        raise UserError(f"--torch_compile needs a C++ compiler, and there is no {compiler} here: install one (apt install g++), name it in "
                        "the variable CXX, or leave --torch_compile out")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise UserError("--torch_compile needs the headers of Python, and there is no Python.h here: install them (apt install "
                        "python3-dev), or leave --torch_compile out")


@contextlib.contextmanager
def compiled_blocks(model, training):
    """Within this context the blocks of `model` are compiled; they run so within `running()` only."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError(f"--torch_compile: {type(model).__name__} has no blocks that transformers marks as such: leave it out")
    # How many blocks of queries there are depends on the mask's numbers, which a graph can't know.
    AttentionInterface.register(cpu_attention.NAME, torch.compiler.disable(cpu_attention.attend))
    for block in blocks:
        block.compile(backend=training.torch_compile_backend, mode=training.torch_compile_mode, dynamic=True)
    try:
        # optimize_ddp would cut graphs where DDP sends gradients; between blocks they are cut already.
        limits = {"recompile_limit": COMPILATIONS, "accumulated_recompile_limit": COMPILATIONS, "optimize_ddp": False}
        with torch._dynamo.config.patch(limits), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        AttentionInterface.register(cpu_attention.NAME, cpu_attention.attend)
        for block in blocks:
            block._compiled_call_impl = None


def running():
    """The context in which compiled blocks run compiled."""
    return torch.compiler.set_stance("default")
