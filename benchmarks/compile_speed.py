"""What --torch_compile costs and saves: LoRA (r=8 on all linear layers) on random rows, in one process, without it and with it in turn:

    python benchmarks/compile_speed.py --model smollm2 --rows 4 --tokens 256 --rounds 5

For each kind of batch (rows all of one length, padded rows, a single row) it shows the CPU seconds of compiling, those of a forward and
backward pass without and with it (median of the rounds), and how many passes win the compiling back. CPU seconds are those of all threads
and compilers: on a busy machine they tell more than the clock. Unless --cache names a folder, PyTorch's store of what was compiled before
is empty; a second run with the same folder shows what is left to do then.
"""

import argparse
import os
import resource
import statistics
import tempfile
from types import SimpleNamespace

KINDS = ("equal", "padded", "single")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of a row; half of them are trained on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of batches")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--no_bf16", action="store_true", help="fp32, where the hardware has bf16")
    parser.add_argument("--cache", help="folder of what was compiled before")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = options.cache or empty
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else processes compile whose CPU seconds can't be read
        measure(options)


def measure(options):
    import torch
    from transformers import TrainingArguments

    from recipes import lora
    from recipes.common import args, compilation, cpu_attention, losses, models
    from recipes.common.trainer import prepare

    training = TrainingArguments(output_dir="unused", bf16=models.native_bf16() and not options.no_bf16, torch_compile=True,
                                 torch_compile_backend=options.backend, use_cpu=not torch.accelerator.is_available())
    task = SimpleNamespace(peft_type="CAUSAL_LM", new_modules=lambda: None)
    model = lora.adapt(models.load(models.resolve(options.model)), task, lora.MethodArguments(), training)[0].train()
    prepare(model, training, args.SharedArguments())
    model.to(training.device)
    network = losses.network(model)
    generator = torch.Generator().manual_seed(0)

    def batch(kind):
        shape = (1 if kind == "single" else options.rows, options.tokens)
        ids, mask = torch.randint(5, network.config.vocab_size, shape, generator=generator), torch.ones(shape, dtype=torch.long)
        if kind == "padded":
            mask[0, -options.tokens // 8:] = 0
        labels = torch.where((mask == 1) & (torch.arange(shape[1]) % 2 == 1), ids, -100)
        return {"input_ids": ids.to(training.device), "attention_mask": mask.to(training.device), "labels": labels.to(training.device)}

    def run(inputs) -> float:
        """CPU seconds of a forward and backward pass."""
        began = cpu_seconds()
        with torch.autocast(network.device.type, torch.bfloat16, enabled=training.bf16):
            loss = sum(part.nll().mean() for part in losses.next_token(model, inputs))
        loss.backward()
        model.zero_grad()
        return cpu_seconds() - began

    print(f"{options.model}, {options.rows} x {options.tokens} tokens, {'bf16' if training.bf16 else 'fp32'} on {network.device}, "
          f"{torch.get_num_threads()} threads, {options.backend}")
    print("| batch | compiling, CPU s | without, CPU s | with | with / without | passes to win it back |\n|---|---|---|---|---|---|")
    cpu_attention.choose(network, options.tokens)
    with compilation.compiled_blocks(network, training):
        for kind in options.kinds:
            inputs, plain, compiled = batch(kind), [], []
            run(inputs)
            with compilation.running():
                first = run(inputs)
                run(inputs)
            for _ in range(options.rounds):
                plain.append(run(inputs))
                with compilation.running():
                    compiled.append(run(inputs))
            before, after = statistics.median(plain), statistics.median(compiled)
            even = f"{(first - after) / (before - after):.0f}" if after < before else "never"
            print(f"| {kind} | {first - after:.0f} | {before:.3f} | {after:.3f} | {after / before:.2f} | {even} |", flush=True)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
