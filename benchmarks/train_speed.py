"""Training speed and memory against plain Trainer and TRL, on the same rows, model, method, effective batch and trained tokens:

    pip install -r requirements-bench.txt
    python benchmarks/train_speed.py --data DIALOGUES.jsonl --rounds 2
    python benchmarks/train_speed.py --data data/e2e_nlg/train.jsonl --task translate --step 32 --rows 160
    python benchmarks/train_speed.py --sizes 1M 10M 35M 135M --lengths 512 --contenders ours "trainer 1x8"

Each contender runs in a process of its own, in turn, so that a slow spell of the machine hits all alike; compare the ratios. The rows of a
step are those of the file in its shuffled order, the same for all, each method at its recipe's settings with learning rate 1e-4; LoRA is
r=8 on all linear layers, no dropout. "1x8" is one row at a time with the gradients of a step added up, "8x1" all rows of a step at once,
padded; with --step, that many rows instead of 8. A step's time excludes the first step (warm-up), evaluation and saving. CPU seconds are
those of all threads: on a busy machine they tell more than the clock. Peak memory is the process's largest resident size.

"of peak" is the share of the machine's matrix-product rate, measured in the same process and precision, that the products reach which a
step can't do without: with the weights of the blocks for each token, and with the vocabulary for each token trained on; twice the work for
the backward pass if the weights are trained, once if they are frozen. "loss off" is the largest difference of a step's loss from that of
"trainer 1x8", in fp32, in %.

--lengths and --sizes measure how it scales: random rows of exactly so many tokens, half of them trained on, and Llamas with random weights.
"""

import argparse
import importlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTENDERS = {
    "ours": "this project at its defaults: LoRA",
    "ours fp32": "this project, LoRA, --no_bf16",
    "ours full": "this project at its defaults: full fine-tuning",
    "ours prefix": "this project at its defaults: prefix-tuning",
    "ours adapter": "this project at its defaults: adapters",
    "ours row by row": "this project, LoRA, each row by itself (--micro_batch_tokens 1)",
    "trainer 1x8": "plain Trainer, LoRA, fp32, batch 1 x 8 accumulation",
    "trainer 8x1": "plain Trainer, LoRA, fp32, batch 8, padded",
    "trainer bf16 1x8": "plain Trainer, LoRA, bf16, batch 1 x 8 accumulation",
    "trainer full 1x8": "plain Trainer, full fine-tuning, fp32, batch 1 x 8 accumulation",
    "trainer full bf16 1x8": "plain Trainer, full fine-tuning, bf16, batch 1 x 8 accumulation",
    "trl default": "TRL SFTTrainer at its defaults, LoRA (bf16, batch 8, activation checkpointing)",
    "trl best": "TRL SFTTrainer, LoRA, bf16, batch 1 x 8 accumulation, no checkpointing",
    "trl fp32": "the same in fp32: TRL's best on a CPU without bf16",
}
# Llamas with random weights: vocabulary, width, inner width, blocks, heads, heads of keys and values. 135M is the shape of SmolLM2-135M.
SIZES = {"1M": (4096, 128, 352, 4, 4, 2), "10M": (4096, 320, 864, 8, 5, 1), "35M": (4096, 512, 1376, 12, 8, 2),
         "135M": (49_152, 576, 1536, 30, 9, 3), "1B": (128_256, 2048, 8192, 16, 32, 8)}
LORA = dict(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file of dialogues, or of rows of --task; needed without --lengths")
    parser.add_argument("--task", default="chat", choices=["chat", "translate"], help="what the rows are (default: chat)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, help="rows used, the first of a seeded shuffle (default: 48; of random ones, four steps)")
    parser.add_argument("--step", type=int, nargs="+", default=[8], help="rows of an optimizer step; several: one table each (default: 8)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[None], help="random rows of so many tokens; several: one table each")
    parser.add_argument("--sizes", nargs="+", default=[None], choices=list(SIZES), help="Llamas with random weights; one table each")
    parser.add_argument("--rounds", type=int, default=1, help="times each contender runs (default: 1)")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME",
                        help="; ".join(f'"{name}": {what}' for name, what in CONTENDERS.items()))
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--one", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.data and options.lengths == [None]:
        parser.error("--data or --lengths is needed")
    if options.sizes != [None] and options.lengths == [None]:
        parser.error("--sizes needs --lengths: models with random weights have no tokenizer")
    if options.rows and options.rows < 2 * max(options.step):
        parser.error(f"--rows {options.rows}: a step of {max(options.step)} rows is needed to warm up, and one more to measure")
    if options.one:
        Path(options.out).write_text(json.dumps(run(options)))
        return
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, length, step in itertools.product(options.sizes, options.lengths, options.step):
            own = [*(["--sizes", size] if size else []), *(["--lengths", str(length)] if length else []), "--step", str(step)]
            title = " ".join(own)
            results = tables[title] = {name: [] for name in options.contenders}
            for _ in range(options.rounds):
                for name in options.contenders:
                    out = Path(folder) / "out.json"
                    # The last value of a flag that is given twice counts.
                    subprocess.run([sys.executable, __file__, *sys.argv[1:], *own, "--one", name, "--out", str(out)], check=True,
                                   stdout=subprocess.DEVNULL)
                    results[name].append(json.loads(out.read_text()))
                    print(f"{title}, {name}: {results[name][-1]['seconds_per_step']:.2f} s a step", file=sys.stderr)
            print(f"\n{title}")
            show(results)
    if options.json:
        Path(options.json).write_text(json.dumps(tables, indent=2) + "\n")


def show(results: dict) -> None:
    """The medians, each contender beside the first."""
    first = statistics.median(r["seconds_per_step"] for r in next(iter(results.values())))
    exact = results["trainer 1x8"][0]["losses"] if "trainer 1x8" in results else None
    print(f"{'':<22} {'s/step':>8} {'CPU s/step':>10} {'tokens/s':>9} {'ratio':>6} {'of peak':>7} {'padding':>7} {'peak GB':>7} "
          f"{'loss off':>8}  losses of the steps")
    for name, rounds in results.items():
        seconds, cpu, tokens, share = (statistics.median(r[key] for r in rounds)
                                       for key in ("seconds_per_step", "cpu_seconds_per_step", "tokens_per_second", "of_peak"))
        memory, padding, losses = max(r["peak_gb"] for r in rounds), rounds[0]["padding"], rounds[0]["losses"]
        off = "" if exact is None else f"{max(abs(a / b - 1) for a, b in zip(losses, exact, strict=True)):.2%}"
        print(f"{name:<22} {seconds:>8.2f} {cpu:>10.2f} {tokens:>9.0f} {seconds / first:>6.2f} {share:>7.1%} {padding:>7.1%} "
              f"{memory:>7.1f} {off:>8}  " + " ".join(f"{loss:.4f}" for loss in losses))


def run(options) -> dict:
    """One contender: seconds per step, tokens per second, peak memory, losses."""
    import random

    import torch
    from transformers import TrainerCallback, set_seed

    from recipes.common import args, data, models, runs, tasks

    class Clock(TrainerCallback):
        def __init__(self):
            self.times, self.losses = [], []  # (clock, CPU of all threads) in seconds at the end of each step

        def on_step_end(self, *_, **__):
            usage = resource.getrusage(resource.RUSAGE_SELF)
            self.times.append((time.perf_counter(), usage.ru_utime + usage.ru_stime))

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    set_seed(0)
    [step], [length], [size] = options.step, options.lengths, options.sizes
    shared = args.SharedArguments(task=options.task, max_length=1024)
    kind = tasks.module(options.task)
    source = models.resolve(options.model)
    rows = [] if length else list(data.read(Path(options.data), kind.check(shared)).rows)
    task = kind.make(shared, source, models.load_tokenizer(source), kind.facts(rows, shared))
    if length:
        shape = size and SIZES[size]
        task.train = random_rows(options.rows or 4 * step, length, shape[0] if shape else len(task.tokenizer))
    else:
        random.Random(0).shuffle(rows)
        task.train, _ = task.encode(kind.rows(rows[: options.rows or 48], shared), options.data)
    steps = len(task.train) // step
    clock, rate = Clock(), {}
    with tempfile.TemporaryDirectory() as folder:
        if size:
            task.source = random_model(size, Path(folder) / "model")
        trainer = make(options.one, task, shared, clock, folder, steps, step)
        for dtype in (torch.float32, torch.bfloat16):
            rate[dtype] = product_rate(trainer.args.device, dtype)
        positions = count_positions(trainer.model)
        trainer.train()
    lengths = [len(row["input_ids"]) for row in task.train]
    supervised = [sum(label != -100 for label in row["labels"]) for row in task.train]
    seconds, cpu = ((last - first) / (steps - 1) for first, last in zip(clock.times[0], clock.times[-1], strict=True))
    counted = slice(step, step * steps)
    products = products_of(trainer.model, sum(lengths[counted]), sum(supervised[counted])) / (steps - 1)
    precision = torch.bfloat16 if trainer.args.bf16 else torch.float32
    return {"seconds_per_step": seconds, "cpu_seconds_per_step": cpu, "tokens_per_second": sum(lengths[counted]) / (steps - 1) / seconds,
            "of_peak": products / seconds / rate[precision], "padding": 1 - sum(lengths[: step * steps]) / positions[0],
            "product_rates": {str(dtype): value for dtype, value in rate.items()},
            "peak_gb": runs.peak_memory_mb() / 1000, "losses": clock.losses, "supervised": sum(supervised)}


def random_rows(count: int, length: int, vocabulary: int):
    """Rows of `length` random tokens, the second half of each trained on."""
    import torch
    from datasets import Dataset

    ids = torch.randint(10, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * (length // 2) + row[length // 2:]} for row in ids])


def random_model(size: str, folder: Path):
    """A Llama of SIZES with random weights, saved in `folder`; its models.Source."""
    from transformers import AutoModelForCausalLM

    from recipes.common import models

    AutoModelForCausalLM.from_config(llama(size)).save_pretrained(folder)
    return models.resolve(str(folder))


def llama(size: str):
    """The config of a Llama of SIZES."""
    from transformers import LlamaConfig

    vocabulary, width, inner, blocks, heads, kv_heads = SIZES[size]
    return LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
                       num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192, tie_word_embeddings=True)


def product_rate(device, dtype, n: int = 1024) -> float:
    """Floating-point operations a second of products of (n, n) matrices on `device`, the best of five."""
    import torch

    a, b, best = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def products_of(model, tokens: int, supervised: int) -> float:
    """Floating-point operations of the products that training on these tokens can't do without (see the text at the top)."""
    from recipes.common.losses import network

    base = network(model)
    tables = {id(base.get_input_embeddings().weight), id(base.get_output_embeddings().weight)}
    own = ("lora_", "bottleneck_", "prompt_encoder")
    matrices = {name: p for name, p in base.named_parameters() if p.dim() == 2 and id(p) not in tables and not any(o in name for o in own)}
    passes = 3 if all(p.requires_grad for p in matrices.values()) else 2
    return 2 * passes * (sum(p.numel() for p in matrices.values()) * tokens + base.get_output_embeddings().weight.numel() * supervised)


def count_positions(model) -> list[int]:
    """[positions, padding included, that `model` reads from now on]."""
    from recipes.common.losses import network

    positions = [0]

    def count(module, args):
        positions[0] += args[0].numel()

    network(model).get_input_embeddings().register_forward_pre_hook(count)
    return positions


def make(name, task, shared, clock, folder, steps, step):
    """The contender's trainer, ready to train."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from recipes.common import args, models
    from recipes.common.trainer import RecipeTrainer

    # In file order, so that every contender sees the same rows at the same step.
    common = dict(output_dir=folder, max_steps=steps, learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1,
                  save_strategy="no", eval_strategy="no", report_to="none", train_sampling_strategy="sequential", seed=0)
    who, *words = name.split()
    data = dict(train_dataset=task.train, data_collator=task.collate)
    if who == "ours":
        recipe = importlib.import_module(f"recipes.{next((word for word in words if word in ('full', 'prefix', 'adapter')), 'lora')}")
        flags = [word for key, value in common.items() for word in (f"--{key}", str(value))]
        flags += ["--per_device_train_batch_size", str(step)] + (["--no_bf16"] if "fp32" in words else [])
        flags += ["--micro_batch_tokens", "1" if "row" in words else "0"]  # 1: each row alone; 0: the default
        own, method, training = args.parse("", recipe.MethodArguments, flags)
        shared.micro_batch_tokens = own.micro_batch_tokens
        model, callbacks = recipe.adapt(task.load_model(), task, method, training)
        return RecipeTrainer(model=model, args=training, task=task, shared=shared, callbacks=[*callbacks, clock], **data)
    batch = (step, 1) if name in ("trainer 8x1", "trl default") else (1, step)
    common |= dict(per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1], use_cpu=not torch.accelerator.is_available())
    model = models.load(task.source, AutoModelForCausalLM)
    if who == "trainer":
        if "full" not in words:
            model = get_peft_model(model, LoraConfig(**LORA))
        return Trainer(model=model, args=TrainingArguments(**common, bf16="bf16" in words), callbacks=[clock], **data)
    from trl import SFTConfig, SFTTrainer

    if name != "trl default":
        common["gradient_checkpointing"] = False
    if name == "trl fp32":
        common["bf16"] = False
    return SFTTrainer(model=model, args=SFTConfig(**common), train_dataset=task.train, processing_class=task.tokenizer,
                      peft_config=LoraConfig(**LORA), callbacks=[clock])


if __name__ == "__main__":
    main()
