"""Training speed and memory against plain Trainer and TRL, on the same rows, model, method, effective batch and trained tokens:

    pip install -r requirements-bench.txt
    python benchmarks/train_speed.py --data DIALOGUES.jsonl --rounds 2

Each contender runs in a process of its own, in turn, so that a slow spell of the machine hits all alike; compare the ratios. Eight rows a
step, in file order, each method at its recipe's settings with learning rate 1e-4; LoRA is r=8 on all linear layers, no dropout. A step's
time excludes the first step (warm-up), evaluation and saving. CPU seconds are those of all threads: on a busy machine they tell more than
the clock. Peak memory is the process's largest resident size. Short rows: --task translate with what data/prepare/e2e_nlg.py
writes.
"""

import argparse
import importlib
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
    "trainer 1x8": "plain Trainer, LoRA, fp32, batch 1 x 8 accumulation",
    "trainer 8x1": "plain Trainer, LoRA, fp32, batch 8, padded",
    "trainer bf16 1x8": "plain Trainer, LoRA, bf16, batch 1 x 8 accumulation",
    "trainer full 1x8": "plain Trainer, full fine-tuning, fp32, batch 1 x 8 accumulation",
    "trainer full bf16 1x8": "plain Trainer, full fine-tuning, bf16, batch 1 x 8 accumulation",
    "trl default": "TRL SFTTrainer at its defaults, LoRA (bf16, batch 8, activation checkpointing)",
    "trl best": "TRL SFTTrainer, LoRA, bf16, batch 1 x 8 accumulation, no checkpointing",
}
LORA = dict(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a file of dialogues, or of rows of --task")
    parser.add_argument("--task", default="chat", choices=["chat", "translate"], help="what the rows are (default: chat)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=48, help="rows used, the first of a seeded shuffle (default: 48)")
    parser.add_argument("--rounds", type=int, default=1, help="times each contender runs (default: 1)")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--one", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        Path(options.out).write_text(json.dumps(run(options)))
        return
    results = {name: [] for name in options.contenders}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name in options.contenders:
                out = Path(folder) / "out.json"
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", name, "--out", str(out)], check=True,
                               stdout=subprocess.DEVNULL)
                results[name].append(json.loads(out.read_text()))
                print(f"{name}: {results[name][-1]['seconds_per_step']:.2f} s a step", file=sys.stderr)
    show(results)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


def show(results: dict) -> None:
    """The medians, each contender beside the first."""
    first = statistics.median(r["seconds_per_step"] for r in next(iter(results.values())))
    print(f"{'':<22} {'s/step':>8} {'CPU s/step':>10} {'tokens/s':>9} {'ratio':>6} {'peak GB':>8}  losses of the steps")
    for name, rounds in results.items():
        seconds, cpu, tokens = (statistics.median(r[key] for r in rounds)
                                for key in ("seconds_per_step", "cpu_seconds_per_step", "tokens_per_second"))
        memory = max(r["peak_gb"] for r in rounds)
        losses = " ".join(f"{loss:.4f}" for loss in rounds[0]["losses"])
        print(f"{name:<22} {seconds:>8.2f} {cpu:>10.2f} {tokens:>9.0f} {seconds / first:>6.2f} {memory:>8.1f}  {losses}")


def run(options) -> dict:
    """One contender: seconds per step, tokens per second, peak memory, losses."""
    import random

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
    shared = args.SharedArguments(task=options.task, max_length=1024)
    kind = tasks.module(options.task)
    rows = list(data.read(Path(options.data), kind.check(shared)).rows)
    random.Random(0).shuffle(rows)
    source = models.resolve(options.model)
    task = kind.make(shared, source, models.load_tokenizer(source), kind.facts(rows, shared))
    features, counts = task.encode(kind.rows(rows[: options.rows], shared), options.data)
    task.train = features
    steps = len(features) // 8
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(options.one, task, shared, clock, folder, steps)
        trainer.train()
    lengths = [len(row["input_ids"]) for row in features]
    seconds, cpu = ((last - first) / (steps - 1) for first, last in zip(clock.times[0], clock.times[-1], strict=True))
    return {"seconds_per_step": seconds, "cpu_seconds_per_step": cpu,
            "tokens_per_second": sum(lengths[8: 8 * steps]) / (steps - 1) / seconds,
            "peak_gb": runs.peak_memory_mb() / 1000, "losses": clock.losses, "supervised": counts["supervised"]}


def make(name, task, shared, clock, folder, steps):
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
        recipe = importlib.import_module(f"recipes.{next((word for word in words if word != 'fp32'), 'lora')}")
        flags = [word for key, value in common.items() for word in (f"--{key}", str(value))]
        batch = ["--per_device_train_batch_size", "1" if not torch.accelerator.is_available() else "8"]
        batch += ["--gradient_accumulation_steps", "8" if not torch.accelerator.is_available() else "1"]
        _, method, training = args.parse("", recipe.MethodArguments, flags + batch + (["--no_bf16"] if "fp32" in words else []))
        model, callbacks = recipe.adapt(task.load_model(), task, method, training)
        return RecipeTrainer(model=model, args=training, task=task, shared=shared, callbacks=[*callbacks, clock], **data)
    batch = (8, 1) if name in ("trainer 8x1", "trl default") else (1, 8)
    common |= dict(per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1], use_cpu=not torch.accelerator.is_available())
    model = models.load(task.source, AutoModelForCausalLM)
    if who == "trainer":
        if "full" not in words:
            model = get_peft_model(model, LoraConfig(**LORA))
        return Trainer(model=model, args=TrainingArguments(**common, bf16="bf16" in words), callbacks=[clock], **data)
    from trl import SFTConfig, SFTTrainer

    if name == "trl best":
        common["gradient_checkpointing"] = False
    return SFTTrainer(model=model, args=SFTConfig(**common), train_dataset=task.train, processing_class=task.tokenizer,
                      peft_config=LoraConfig(**LORA), callbacks=[clock])


if __name__ == "__main__":
    main()
