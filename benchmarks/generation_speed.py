"""Greedy replies in batches, as scripts/evaluate.py writes them, against plain `generate` with one prompt at a time:

    python benchmarks/generation_speed.py --data data/customer_service/test.jsonl --rows 16
    python benchmarks/generation_speed.py --data data/customer_service/test.jsonl --run runs/lora-gpt2

Each assistant turn of the dialogues is answered from its true history. Both ways run in turn in one process, on the same model and
prompts. The tokens counted are those that plain `generate` writes, so the ratio is that of the times. "same" counts the replies that are
equal; in fp32 all should be but for near ties, which differently shaped matrices may round to either side.
"""

import argparse
import json
import statistics
import time
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a file of dialogues")
    parser.add_argument("--model", default="smollm2", help="Hub id, folder or bundled name (default: smollm2)")
    parser.add_argument("--run", help="a run folder, in place of --model")
    parser.add_argument("--rows", type=int, default=8, help="dialogues, the first of the file (default: 8)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--batch_size", type=int, default=32, help="replies written together (default: 32)")
    parser.add_argument("--rounds", type=int, default=1, help="times each way runs (default: 1)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: float32)")
    parser.add_argument("--json", help="write the figures to this file")
    result = run(parser.parse_args())
    print(f"{result['prompts']} replies, {result['tokens']} tokens, {result['same']} the same")
    for way in ("one by one", "in batches"):
        seconds, cpu = (statistics.median(values) for values in zip(*result[way], strict=True))
        print(f"{way:<12} {seconds:>8.2f} s {cpu:>8.2f} CPU s {result['tokens'] / seconds:>8.1f} tokens/s")
    if result["options"]["json"]:
        Path(result["options"]["json"]).write_text(json.dumps(result, indent=2) + "\n")


def run(options) -> dict:
    """Seconds and CPU seconds of each round of each way, the tokens written, and how many replies are the same."""
    import torch
    from transformers import AutoModelForCausalLM

    from recipes.common import chat, data, generation, models

    dtype = getattr(torch, options.dtype)
    if options.run:
        tokenizer = models.load_run_tokenizer(Path(options.run))
        model = models.load_run(Path(options.run), dtype, merge=True)
    else:
        source = models.resolve(options.model)
        tokenizer = models.load_tokenizer(source)
        chat.prepare(tokenizer)
        model = models.load(source, AutoModelForCausalLM, dtype)
        model.generation_config = models.generation_config(tokenizer)
    model = model.eval().to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    rows = data.read(Path(options.data), data.check_dialogue).rows[: options.rows]
    limit = generation.limit(model, 768, options.max_new_tokens)
    prompts = [ids for _, _, ids in generation.prompts_for(rows, tokenizer, limit) if ids is not None]
    result = {"prompts": len(prompts), "one by one": [], "in batches": [], "options": vars(options)}
    for _ in range(options.rounds):
        (plain, tokens), times = clocked(one_by_one, model, tokenizer, prompts, options.max_new_tokens)
        result["one by one"].append(times)
        (batched, _), times = clocked(generation.replies, model, tokenizer, prompts, options.max_new_tokens, options.batch_size)
        result["in batches"].append(times)
    return result | {"tokens": tokens, "same": sum(one == other for one, other in zip(plain, batched, strict=True))}


def clocked(function, *args):
    """What `function(*args)` returns, and the (seconds, CPU seconds of all threads) that it took."""
    start, cpu = time.perf_counter(), time.process_time()
    result = function(*args)
    return result, (time.perf_counter() - start, time.process_time() - cpu)


def one_by_one(model, tokenizer, prompts, max_new_tokens: int) -> tuple[list[str], int]:
    """Replies by `generate` on each prompt alone, and the tokens written, those that end a reply included."""
    import torch

    from recipes.common import generation

    texts, tokens = [], 0
    for ids in prompts:
        ids = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
        written = out[0, ids.shape[1]:]
        tokens += len(written)
        texts.append(generation.text(written.tolist(), model, tokenizer)[0])
    return texts, tokens


if __name__ == "__main__":
    main()
