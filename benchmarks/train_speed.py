"""Training speed and memory against plain Trainer and TRL, on the same rows, model, method, effective batch and trained tokens:

    pip install -r requirements-bench.txt
    python benchmarks/train_speed.py --data DIALOGUES.jsonl --rounds 2

Each contender runs in a process of its own, in turn, so that a slow spell of the machine hits all alike; compare the ratios. LoRA r=8
on all linear layers, no dropout, learning rate 1e-4, 8 dialogues a step, the rows in file order. A step's time excludes the first
step (warm-up), evaluation and saving. Peak memory is the process's largest resident size.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTENDERS = {
    "ours": "this project at its defaults",
    "ours fp32": "this project, --no_bf16",
    "trainer 1x8": "plain Trainer, fp32, batch 1 x 8 accumulation",
    "trainer 8x1": "plain Trainer, fp32, batch 8, padded",
    "trl default": "TRL SFTTrainer at its defaults (bf16, batch 8, activation checkpointing)",
    "trl best": "TRL SFTTrainer, bf16, batch 1 x 8 accumulation, no checkpointing",
}
LORA = dict(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a .jsonl file of dialogues")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=48, help="dialogues used, the first of a seeded shuffle (default: 48)")
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
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE if name else None)
                results[name].append(json.loads(out.read_text()))
                print(f"{name}: {results[name][-1]['seconds_per_step']:.2f} s a step", file=sys.stderr)
    show(results)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


def show(results: dict) -> None:
    """The medians, each contender beside the first."""
    first = statistics.median(r["seconds_per_step"] for r in next(iter(results.values())))
    print(f"{'':<14} {'s/step':>8} {'tokens/s':>9} {'ratio':>6} {'peak GB':>8}  losses of the steps")
    for name, rounds in results.items():
        seconds = statistics.median(r["seconds_per_step"] for r in rounds)
        tokens = statistics.median(r["tokens_per_second"] for r in rounds)
        memory = max(r["peak_gb"] for r in rounds)
        losses = " ".join(f"{loss:.4f}" for loss in rounds[0]["losses"])
        print(f"{name:<14} {seconds:>8.2f} {tokens:>9.0f} {seconds / first:>6.2f} {memory:>8.1f}  {losses}")


def run(options) -> dict:
    """One contender: seconds per step, tokens per second, peak memory, losses."""
    import random

    from transformers import TrainerCallback, set_seed

    from recipes.common import chat, data, models, runs, tasks

    class Clock(TrainerCallback):
        def __init__(self):
            self.times, self.losses = [], []

        def on_step_end(self, *_, **__):
            self.times.append(time.perf_counter())

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    set_seed(0)
    rows = data.read(Path(options.data), data.check_dialogue).rows
    random.Random(0).shuffle(rows)
    source = models.resolve(options.model)
    tokenizer = models.load_tokenizer(source)
    chat.prepare(tokenizer)
    features, counts = tasks.encode_dialogues(rows[: options.rows], tokenizer, 1024, options.data)
    steps = len(features) // 8
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(options.one, features, source, tokenizer, clock, folder, steps)
        trainer.train()
    lengths = [len(row["input_ids"]) for row in features]
    seconds = (clock.times[-1] - clock.times[0]) / (steps - 1)
    return {"seconds_per_step": seconds, "tokens_per_second": sum(lengths[8: 8 * steps]) / (steps - 1) / seconds,
            "peak_gb": runs.peak_memory_mb() / 1000, "losses": clock.losses, "supervised": counts["supervised_tokens"]}


def make(name, features, source, tokenizer, clock, folder, steps):
    """The contender's trainer, ready to train."""
    import functools

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from recipes.common import args, chat, models
    from recipes.common.trainer import RecipeTrainer
    from recipes.lora import MethodArguments

    # In file order, so that every contender sees the same rows at the same step.
    common = dict(output_dir=folder, max_steps=steps, learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1,
                  save_strategy="no", eval_strategy="no", report_to="none", train_sampling_strategy="sequential", seed=0)
    collate = functools.partial(chat.pad, pad_id=tokenizer.pad_token_id)
    if name.startswith("ours"):
        flags = [word for key, value in common.items() for word in (f"--{key}", str(value))]
        _, _, training = args.parse("", MethodArguments, flags + (["--no_bf16"] if "fp32" in name else []))
        model = get_peft_model(models.load(source, tokenizer), LoraConfig(**LORA))
        return RecipeTrainer(model=model, args=training, train_dataset=features, data_collator=collate, callbacks=[clock])
    batch = (8, 1) if name in ("trainer 8x1", "trl default") else (1, 8)
    common |= dict(per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1], use_cpu=not torch.accelerator.is_available())
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    if name.startswith("trainer"):
        return Trainer(model=get_peft_model(model, LoraConfig(**LORA)), args=TrainingArguments(**common), train_dataset=features,
                       data_collator=collate, callbacks=[clock])
    from trl import SFTConfig, SFTTrainer

    if name == "trl best":
        common["gradient_checkpointing"] = False
    return SFTTrainer(model=model, args=SFTConfig(**common), train_dataset=features, processing_class=tokenizer,
                      peft_config=LoraConfig(**LORA), callbacks=[clock])


if __name__ == "__main__":
    main()
