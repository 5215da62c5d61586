"""Score a finished run on dialogues it has not seen, beside the untuned model if asked:

    python scripts/evaluate.py --run runs/lora-gpt2 --base

Each assistant turn is answered given its true history and compared with the reference: loss and perplexity over the reference's
tokens, and of the greedy replies corpus BLEU, ROUGE-1/2/L, chrF (0-100) and distinct-1/2 (0-1), per language and in all. Results go
into the run's run.json and report.html, the replies beside their references into predictions-SPLIT.jsonl.
"""

import argparse
import json
import math
import sys
from pathlib import Path

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, errors
from recipes.common.errors import UserError

COLUMNS = {"loss": "loss", "perplexity": "perplexity", "bleu": "BLEU", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
           "chrf": "chrF", "distinct1": "distinct-1", "distinct2": "distinct-2"}


def main():
    errors.install()
    options = parse()
    from recipes.common import models, runs

    run = Path(options.run)
    record = models.read_record(run)
    if options.json and (Path(options.json).is_dir() or not Path(options.json).absolute().parent.is_dir()):
        raise UserError(f"--json {options.json}: name a file in a folder that exists")
    source, rows, label = held_out_rows(options, record)
    used = record["model"]["used"]
    dtype = models.dtype(options.dtype)
    model, tokenizer = models.load_run(run, dtype, merge=True)
    rows = renderable(rows, tokenizer, record["shared_arguments"]["on_bad_row"])
    print(f"{len(rows)} dialogues from {source}")
    tuned = answer((model, tokenizer), rows, record, options, record["recipe"])
    results = {record["recipe"]: tuned}
    if options.base:
        results = {f"{used} (untuned)": answer(models.load_base(run, dtype), rows, record, options, f"{used} (untuned)"), **results}
    evaluation = summarise(results, rows, source, options, str(dtype).removeprefix("torch."))
    print_table(evaluation)
    print_samples(evaluation)
    predictions = run / f"predictions-{label}.jsonl"
    predictions.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in evaluation.pop("predictions")), encoding="utf-8")
    if options.json:
        Path(options.json).write_text(json.dumps(runs.visible(evaluation), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    record.setdefault("evaluation", {})[label] = evaluation
    runs.write(run, record)
    print(f"\nall replies: {predictions}; report: {run / 'report.html'}\n"
          f"next:\n"
          f"  {runs.python()} scripts/chat.py --run {run}\n  {runs.python()} -m tensorboard.main --logdir {run}\n"
          f"  {runs.python()} scripts/train.py   (lists the other recipes)")


def parse(argv=None):
    """The command line of this script."""
    parser = args.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", required=True, help="the run folder (--output_dir of the training)")
    parser.add_argument("--data", help="a file, folder or Hub id (default: the data of the run)")
    parser.add_argument("--columns", help="rename columns of --data, NEW=OLD: source=question,target=answer")
    parser.add_argument("--split", choices=["train", "dev", "test"], help="which rows (default: test, or dev where there is no test file)")
    parser.add_argument("--limit", type=args.positive, help="only the first N dialogues")
    parser.add_argument("--base", action="store_true", help="score the untuned model on the same dialogues as well")
    parser.add_argument("--max_new_tokens", type=args.positive, default=128, help="longest reply (default: 128)")
    parser.add_argument("--batch_size", type=args.positive, default=32, help="replies generated at a time (default: 32)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="what to compute in (default: bfloat16 where the hardware has it)")
    parser.add_argument("--samples", type=args.whole, default=3, help="replies shown at the end (default: 3)")
    parser.add_argument("--json", metavar="OUT", help="write the scores to this file as well")
    return parser.parse_args(argv)


def held_out_rows(options, record) -> tuple[str, list[dict], str]:
    """The dialogues to score on, after where they are from and before a name for the results. A file given by --data is taken whole."""
    from recipes.common import data

    shared, training = record["shared_arguments"], record["training_arguments"]
    given = options.data or shared["data"]  # runs of before --data took several values hold a string
    folder = given if isinstance(given, str) else " ".join(given)
    how = (shared["on_bad_row"], options.columns if options.data else shared.get("columns"))
    # Other data must not replace the scores on the run's own, so its name goes into theirs.
    other = Path(options.data).absolute() if options.data else None
    prefix = f"{other.name}-" if other else ""
    if other and other.is_file():
        if options.split:
            raise UserError(f"--split {options.split}: a file given by --data is scored whole; leave --split out")
        rows, label = data.read(Path(options.data), data.check_dialogue, *how), f"{other.parent.name}-{other.stem}"
    else:
        found = [data.find(source.name) for source in data.sources(given)]
        split = options.split or ("test" if any("test" in files for files in found) else "dev")
        label = prefix + split
        rows = data.load_split(given, split, data.check_dialogue, shared["dev_fraction"], training["seed"], *how)
        if rows is None:
            raise UserError(f"{folder} has no test file: use --split dev, or --data FILE")
        drawn = split != "test" and any("dev" not in files for files in found)  # held out at training time: the same draw again
        if drawn and not options.data and rows.sha256 != record["data"]["splits"][split]["sha256"]:
            raise UserError(f"{folder} has changed since the training, so the rows held out then can't be told from the others: "
                            "give dialogues that the run has not seen with --data FILE")
    for sentence in rows.notes:
        print(f"note: {sentence}")
    for sentence in rows.skipped:
        print(f"skipped {sentence}")
    return rows.source, rows.rows[: options.limit], label


def renderable(rows: list[dict], tokenizer, on_bad_row: str) -> list[dict]:
    """The rows that the model's chat template accepts; the others are listed, or stop the evaluation as they would the training."""
    from recipes.common import chat

    kept = []
    for number, row in enumerate(rows, start=1):
        try:
            chat.spans(row["messages"], tokenizer)
            kept.append(row)
        except chat.TemplateError as error:
            if on_bad_row == "stop":
                raise UserError(f"dialogue {number}: {error}") from error
            print(f"skipped dialogue {number}: {error}")
    if not kept:
        raise UserError("the model's chat template refuses every dialogue")
    return kept


def answer(loaded, rows, record, options, name) -> dict:
    """A model's loss on each row, as (row, nats, tokens), and its reply to each assistant turn."""
    from recipes.common import generation, tasks
    from recipes.common.trainer import dataset_losses

    model, tokenizer = loaded
    max_length = record["shared_arguments"]["max_length"]
    features, counts = tasks.encode_dialogues(rows, tokenizer, max_length, "rows")
    sums = dataset_losses(model, features, tokenizer.pad_token_id, f"Loss of {name}")
    limit = min(max_length, generation.room(model, options.max_new_tokens))
    if limit < 1:
        raise UserError(f"--max_new_tokens {options.max_new_tokens} leaves no room for a question in the model's window: lower it")
    prompts = generation.prompts_for(rows, tokenizer, limit)
    fitting = [p for _, _, p in prompts if p is not None]
    texts, cut = generation.replies(model, tokenizer, fitting, options.max_new_tokens, options.batch_size, f"Replies of {name}")
    texts = iter(texts)
    kept = [r for r in range(len(rows)) if r + 1 not in set(counts["left_out"])]
    return {"losses": list(zip(kept, sums[:, 0].tolist(), sums[:, 1].tolist(), strict=True)), "cut": cut,
            "limit": limit, "too_long": len(prompts) - len(fitting),
            "replies": [(r, t, next(texts) if p is not None else "") for r, t, p in prompts]}


def summarise(results: dict, rows: list[dict], source: str, options, dtype: str) -> dict:
    """The table, samples and predictions of all models, ready for JSON."""
    from recipes.common import metrics

    languages = [language_of(row) for row in rows]
    turns = [(r, t) for r, t, _ in next(iter(results.values()))["replies"]]
    references = [rows[r]["messages"][t]["content"] for r, t in turns]
    table, notes = [], []
    for name, result in results.items():
        scores = metrics.score_replies([text for _, _, text in result["replies"]], references, [languages[r] for r, _ in turns])
        signature = scores.pop("signature")
        for language, score in scores.items():
            part = [(nats, n) for r, nats, n in result["losses"] if language in ("all", languages[r])]
            nats, tokens = sum(nats for nats, _ in part), sum(n for _, n in part)
            score |= {"loss": nats / tokens, "perplexity": metrics.perplexity(nats, tokens)} if part else \
                     {"loss": math.nan, "perplexity": math.nan}
            table.append({"language": language, "model": name, "replies": score["n"], "empty": score["empty"],
                          "values": [score[key] for key in COLUMNS]})
        if result["cut"]:
            notes.append(f"{name}: {result['cut']} of {len(turns)} replies did not end within {options.max_new_tokens} tokens and were cut")
        if result["too_long"]:
            notes.append(f"{name}: {result['too_long']} questions exceed the {result['limit']} tokens that the run's --max_length and the "
                         "model's window leave; their replies count as empty")
    table.sort(key=lambda row: ("en", "zh", "all").index(row["language"]))
    chosen = [round(i * (len(turns) - 1) / max(1, options.samples - 1)) for i in range(min(options.samples, len(turns)))]
    samples = [[*((m["role"], m["content"]) for m in rows[turns[i][0]]["messages"][: turns[i][1]][-1:]), ("reference", references[i]),
                *((name, result["replies"][i][2]) for name, result in results.items())] for i in chosen]
    predictions = [{"id": rows[r].get("id", r), "turn": t, "language": languages[r], "reference": references[i],
                    **{name: result["replies"][i][2] for name, result in results.items()}} for i, (r, t) in enumerate(turns)]
    return {"source": source, "dialogues": len(rows), "replies": len(turns), "columns": list(COLUMNS.values()), "table": table,
            "notes": notes, "signature": f"{signature}; greedy, at most {options.max_new_tokens} new tokens, {dtype}", "samples": samples,
            "predictions": predictions}


def language_of(row: dict) -> str:
    """A row's own "language" if it is one that the metrics cut specially, else "zh" or "en" by its text."""
    from recipes.common import metrics

    if row.get("language") in ("en", "zh"):
        return row["language"]
    return metrics.detect_language(" ".join(m["content"] for m in row["messages"] if m["role"] != "system"))


def print_table(evaluation: dict) -> None:
    """The scores, a line for each language and model."""
    width = max(len(row["model"]) for row in evaluation["table"])
    print(f"\n{'':<4} {'':<{width}} {'replies':>7} " + " ".join(f"{name:>10}" for name in evaluation["columns"]))
    previous = None
    for row in evaluation["table"]:
        language = "" if row["language"] == previous else row["language"]
        previous = row["language"]
        print(f"{language:<4} {row['model']:<{width}} {row['replies']:>7} " + " ".join(f"{value:>10.2f}" for value in row["values"]))
    for note in evaluation["notes"]:
        print(f"note: {note}")
    print(f"({evaluation['signature']})")


def print_samples(evaluation: dict) -> None:
    """Some replies beside their references."""
    for sample in evaluation["samples"]:
        width = max(len(who) for who, _ in sample)
        print("\n" + "\n".join(f"  {who:>{width}} | {text}" for who, text in sample))


if __name__ == "__main__":
    sys.exit(main())
