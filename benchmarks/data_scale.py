"""Reading, checking and tokenizing at scale, beside `datasets.map` with the bare tokenizer on the same texts:

    python benchmarks/data_scale.py --rows 1000000

Writes seeded dialogues, half English and half Chinese, of 2 to 12 turns. A first process reads, checks and tokenizes them as a run does
(`tasks.load`); a second one finds the features in the cache; a third one maps the tokenizer over their rendered texts, without any mask
or check. All use the same number of processes. Peak memory is that of the parent and its children together, sampled twice a second:
what each has of its own and, once, what they share with files on disk (Linux).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ENGLISH = ("where is my order and when will it arrive please could you check the number again it says that parcel was sent on monday "
           "but nothing has come so far I would like a refund or new one thank you for your help we are sorry about this delay let me "
           "look into it right away your card has been blocked and another is on its way within five days").split()
CHINESE = ("您好 请问 我的 包裹 什么时候 能到 订单号 是 麻烦 查一下 已经 发货 但是 还没 收到 可以 退款 或者 换货 吗 非常 抱歉 给您 "
           "带来 不便 我 马上 帮您 处理 这张 卡 已经 冻结 新卡 五天 之内 寄出 还有 别的 问题 谢谢 不客气").split()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", help="where the dialogues and the caches go (default: a temporary folder)")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(CONTENDERS[options.one], options)), file=sys.__stdout__)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        generate(folder / "rows.jsonl", options.rows)
        print(f"{options.rows:,} dialogues, {(folder / 'rows.jsonl').stat().st_size / 1e6:,.0f} MB")
        results = {}
        for name in CONTENDERS:
            given = ["--one", name, "--folder", str(folder), "--rows", str(options.rows), "--model", options.model]
            out = subprocess.run([sys.executable, __file__, *given, "--processes", str(options.processes)], check=True, text=True,
                                 stdout=subprocess.PIPE, env=os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")})
            results[name] = json.loads(out.stdout.splitlines()[-1])
            print(f"{name:<12}" + "  ".join(f"{what} {value:,.1f}" for what, value in results[name].items()), flush=True)
        for unit in ("seconds", "cpu_seconds"):
            print(f"speed of the first run, datasets.map with the bare tokenizer = 1, by {unit}: "
                  f"{results['bare map'][unit] / results['first run'][unit]:.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


def generate(path: Path, rows: int, seed: int = 0) -> None:
    """Write `rows` dialogues; the first N are the same whatever the number."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            words, blank = (ENGLISH, " ") if draw.random() < 0.5 else (CHINESE, "")
            turns = [{"role": role, "content": blank.join(draw.choices(words, k=int(draw.lognormvariate(2.3, 0.6)) + 1))}
                     for _ in range(draw.randint(1, 6)) for role in ("user", "assistant")]
            file.write(json.dumps({"id": number, "messages": turns}, ensure_ascii=False) + "\n")


def run(options) -> dict:
    """What a run does before it trains: read, check, hold out, tokenize, keep."""
    from recipes import lora
    from recipes.common import args, data, disk, tasks

    folder, seconds = Path(options.folder), {}
    given = args.parse("", lora.MethodArguments, [
        "--model", options.model, "--data", str(folder / "rows.jsonl"), "--output_dir", str(folder / "run"), "--report_to", "none",
        "--preprocessing_num_workers", str(options.processes)])
    read = data.load

    def timed(*given):
        start = time.perf_counter()
        result = read(*given)
        seconds["of which reading"] = time.perf_counter() - start
        return result

    data.load = timed
    task = tasks.load(*given)
    kept = sum(file.stat().st_size for file in disk.cache().rglob("*.arrow"))
    return {"rows": len(task.train) + len(task.dev), "tokens": sum(task.report["splits"][split]["tokens"] for split in ("train", "dev")),
            **seconds, "features_mb": kept / 1e6}


def bare_map(options) -> dict:
    """`datasets.map` with the tokenizer alone, over texts that are rendered before the clock starts."""
    from datasets import Dataset

    from recipes.common import chat, models

    tokenizer = models.load_tokenizer(models.resolve(options.model))
    chat.prepare(tokenizer)

    def texts():
        with (Path(options.folder) / "rows.jsonl").open(encoding="utf-8") as file:
            for line in file:
                yield {"text": tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)}

    rendered = Dataset.from_generator(texts)
    clock = Clock()
    mapped = rendered.map(lambda batch: tokenizer(batch["text"]), batched=True, num_proc=options.processes, remove_columns=["text"])
    return {"rows": len(mapped), **clock.read()}


class Clock:
    """Seconds since it was made, on the wall and of the CPU, children that have ended included."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), sum(os.times()[:4])

    def read(self) -> dict:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": sum(os.times()[:4]) - self.cpu}


def measured(contender, options) -> dict:
    """The contender's figures, its time and the peak memory of its processes."""
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.5):
            peak[0] = max(peak[0], memory_mb())

    watcher = threading.Thread(target=watch)
    sys.stdout = sys.stderr  # the figures alone go to the parent
    watcher.start()
    clock = Clock()
    try:
        figures = contender(options)
    finally:
        time_taken = clock.read()
        done.set()
        watcher.join()
    return {**time_taken, **figures, "peak_mb": peak[0]}


def memory_mb() -> float:
    """Memory of this process and its children in MB: pages shared by several count once (proportional set size)."""
    me, total = os.getpid(), 0
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    for pid in [me, *children]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e6


CONTENDERS = {"first run": run, "second run": run, "bare map": bare_map}

if __name__ == "__main__":
    main()
