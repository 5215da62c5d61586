"""Kill a training again and again, resume it each time, and compare what it ends with to a run that nobody disturbed:

    python benchmarks/chaos.py --kills 100

A tiny model with random weights is trained on a few dialogues. Each life of the run is a process of its own (forked, so that the libraries
are imported once) that is ended by SIGKILL and followed by one with --resume_from_checkpoint. A run that reaches its end is compared bit
for bit with the undisturbed one: weights, the losses of all steps, the scores. Then the next run begins, until all kills are done.

`--moments random` (the default) kills after a random share of the processor time that a run takes. `--moments calls` kills at random
calls, counted, of what writes, renames or deletes files and of what computes a step: the same moments on every machine. Each second kill is
aimed inside the saving.
"""

import argparse
import builtins
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from recipes.common import checkpoints, runs, trained
from recipes.common.trainer import RecipeTrainer

TEXTS = ("Where is my order?", "It arrives on Friday.", "我想退货。", "好的，请告诉我订单号。", "Are you open?", "Yes, until nine.")
# 9 rows in steps of 2: five steps an epoch, three epochs; a checkpoint every second step. Dropout needs the random numbers to go on.
FLAGS = ("--num_train_epochs", "3", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--logging_steps", "3",
         "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2",
         "--load_best_model_at_end", "True", "--max_length", "64", "--use_cpu", "--bf16", "False",
         "--report_to", "none", "--disable_tqdm", "True")
RECIPES = {"lora": ("--dropout", "0.1"), "full": (), "prefix": ("--prefix_projection", "--projection_hidden_size", "16"),
           "adalora": ("--init_rank", "4", "--target_rank", "2", "--every", "1", "--last_share", "0.3")}
# What is counted with --moments calls: (module, name, whether it belongs to the saving of a checkpoint).
COUNTED = ((os, "fsync", True), (os, "rename", True), (shutil, "rmtree", True), (torch, "save", True),
           (safetensors.torch, "save_file", True), (trained, "save_file", True), (checkpoints, "_digest", True),
           (checkpoints, "_discard", True),
           (os, "replace", False),
           (RecipeTrainer, "training_step", False), (RecipeTrainer, "prediction_step", False),
           (runs, "finish", False))


def prepare(folder: Path) -> None:
    """A GPT-2 of two layers of width 16 with its tokenizer, and train and dev rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    fast.save_pretrained(folder / "model")
    set_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(fast), n_embd=16, n_layer=2, n_head=2, n_positions=96, bos_token_id=0,
                               eos_token_id=0)).save_pretrained(folder / "model")
    rows = [{"messages": [{"role": "user", "content": TEXTS[2 * (i % 3)]},
                          {"role": "assistant", "content": f"{TEXTS[2 * (i % 3) + 1]} {i}"}]} for i in range(11)]
    (folder / "data").mkdir()
    for split, own in (("train", rows[:9]), ("dev", rows[9:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")


def live(folder: Path, recipe: str, output: Path, kill_at: int | None = None, saving: bool = False, counts: int | None = None) -> int:
    """One life of a run in a forked process; returns its pid. It kills itself at counted call `kill_at`; `counts` is a descriptor that is
    told how many calls there were."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        with open(output.with_suffix(".log"), "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        calls = _count_calls(kill_at, saving)
        resume = ("--resume_from_checkpoint",) if output.exists() and any(output.iterdir()) else ()
        sys.argv = [f"recipes/{recipe}.py", "--model", str(folder / "model"), "--data", str(folder / "data"), "--output_dir", str(output),
                    *FLAGS, *RECIPES[recipe], *resume]
        importlib.import_module(f"recipes.{recipe}").main()
        if counts is not None:
            os.write(counts, json.dumps(calls).encode())
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_calls(kill_at: int | None, saving: bool) -> Counter:
    """Count the calls of COUNTED, those of the saving under "saving"; end the process by SIGKILL before, or after, call `kill_at`."""
    calls = Counter()

    def counted(function, belongs):
        def call(*args, **kwargs):
            kind = "saving" if belongs and trainer_stage() else "other"
            calls[kind] += 1
            here = calls[kind] == kill_at and (kind == "saving") == saving
            if here and kill_at % 3 == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

    def trainer_stage():
        return any(frame.f_code.co_name == "_save_checkpoint" for frame in _frames())

    for owner, name, belongs in COUNTED:
        setattr(owner, name, counted(getattr(owner, name), belongs))
    return calls


def _frames():
    frame = sys._getframe()
    while frame:
        yield frame
        frame = frame.f_back


def _kill_after(pid: int, seconds: float) -> None:
    """End a child by SIGKILL once it has used so much processor time, which goes on whatever else the machine has to do."""
    clock = (~pid << 3) | 2  # Linux: the clock of a process's time on the processors
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.clock_gettime(clock) >= seconds:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.001)


def result(output: Path) -> tuple[dict, list, dict]:
    """What a finished run ends with: its weights, the lines of its log without times, its scores."""
    weights = {path.name: load_file(path) for path in output.glob("*.safetensors")}
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    log = [{key: value for key, value in line.items() if not key.endswith(("_runtime", "_per_second", "_loss")) or key == "eval_loss"}
           for line in record["history"] if "train_runtime" not in line]
    return weights, log, record["metrics"]


def same(one, other) -> bool:
    """Whether two results are equal bit for bit."""
    weights = one[0].keys() == other[0].keys() and all(
        one[0][file].keys() == other[0][file].keys() and all(torch.equal(one[0][file][name], other[0][file][name]) for name in one[0][file])
        for file in one[0])
    return weights and one[1:] == other[1:]


def chaos(folder: Path, recipe: str, kills: int, moments: str, rng: random.Random, say=builtins.print) -> Counter:
    """Kill runs of `recipe` `kills` times in all; counts kills, kills inside saving, runs compared and runs that differed."""
    through, tally = folder / f"{recipe}-undisturbed", Counter()
    reader, writer = os.pipe()
    _, status, usage = os.wait4(live(folder, recipe, through, counts=writer), 0)
    if status:
        raise RuntimeError(f"the undisturbed run failed: {through.with_suffix('.log').read_text(encoding='utf-8')[-2000:]}")
    seconds, calls, wanted = usage.ru_utime + usage.ru_stime, json.loads(os.read(reader, 10_000)), result(through)
    while tally["kills"] < kills:
        output = folder / f"{recipe}-{tally['runs']}"
        planned = min(4, kills - tally["kills"])  # then the run is left to reach its end
        for life in range(planned + 1):
            last, saving = life == planned, moments == "calls" and tally["kills"] % 2 == 0
            # Later lives are shorter, as they begin at a checkpoint.
            at = None if last or moments == "random" else rng.randint(1, max(1, calls["saving" if saving else "other"] // (life + 1)))
            pid = live(folder, recipe, output, at, saving)
            if moments == "random" and not last:
                _kill_after(pid, rng.uniform(0, seconds / (1 + life / 2)))
            status = os.waitpid(pid, 0)[1]
            if os.WIFSIGNALED(status):
                tally["kills"] += 1
                tally["half-written"] += (output / checkpoints.STAGE).exists()
            elif status:
                tally["failed"] += 1
                say(output.with_suffix(".log").read_text(encoding="utf-8")[-3000:])
                break
            else:
                break
        tally["runs"] += 1
        equal = not os.WIFSIGNALED(status) and status == 0 and same(result(output), wanted)
        tally["different"] += not equal
        shutil.rmtree(output)
        say(f"{recipe}, run {tally['runs']}: {tally['kills']} kills so far, {tally['half-written']} of them left a half-written "
            f"checkpoint; {'equal' if equal else 'DIFFERENT'}")
    return tally


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in all (default: 100)")
    parser.add_argument("--moments", choices=("random", "calls"), default="random", help="when to kill (default: random)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    # What a run would import on its way is imported here, once for all lives.
    for name in (*(f"recipes.{recipe}" for recipe in RECIPES), "recipes.common.tasks.chat", "recipes.common.fast_lora",
                 "recipes.common.rank_allocation", "recipes.common.prefix_start", "matplotlib.figure", "matplotlib.backends.backend_svg"):
        importlib.import_module(name)
    gc.freeze()  # every Trainer collects garbage, and would look through all that is imported, in every process
    rng, total = random.Random(options.seed), Counter()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for i, recipe in enumerate(RECIPES):
            share = options.kills * (i + 1) // len(RECIPES) - options.kills * i // len(RECIPES)
            total += chaos(Path(name), recipe, share, options.moments, rng)
    print(f"\n{total['kills']} kills in {total['runs']} runs, {total['half-written']} of them with a checkpoint half-written; "
          f"{total['runs'] - total['different']} runs ended bit for bit as the undisturbed one, {total['different']} did not")
    sys.exit(1 if total["different"] or total["kills"] < options.kills else 0)


if __name__ == "__main__":
    main()
