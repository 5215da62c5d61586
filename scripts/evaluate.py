"""Score a finished run on rows it has not seen, beside the untuned model if asked:

    python scripts/evaluate.py --run runs/lora-gpt2 --base
    python scripts/evaluate.py --run runs/lora-gpt2 --run runs/adapter-gpt2

A chat run answers each assistant turn given its true history: loss and perplexity over the reference's tokens, and of the greedy replies
corpus BLEU, ROUGE-1/2/L, chrF (0-100) and distinct-1/2 (0-1), per language and in all. The other tasks have their own scores
(README.md). Results go into the run's run.json and report.html, the answers beside the right ones into predictions-SPLIT.jsonl, the loss
of each row into losses-SPLIT.json.

    accelerate launch --config_file recipes/accelerate/cpu_processes.yaml scripts/evaluate.py --run runs/lora-gpt2 --base

divides the rows among processes, each on a GPU of its own or all on the CPU.
"""

import argparse
import json
import math
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, errors, processes
from recipes.common.errors import UserError

# Flags that say what a model is asked.
READ_ALIKE = ("context_turns", "multi_label", "oos_label", "instruction", "source_prefix", "next_sentence")


def main():
    errors.install()
    options = parse()
    args.check_launch()
    from recipes.common import checkpoints, comparison, deadline, evaluation, models, runs, tasks

    deadline.limit = options.data_timeout
    args.meet()
    processes.meet()
    run, *others = map(Path, options.run)
    record = models.read_record(run)
    if options.json and (Path(options.json).is_dir() or not Path(options.json).absolute().parent.is_dir()):
        raise UserError(f"--json {options.json}: name a file in a folder that exists")
    if options.num_beams > 1 and record["task"] != "translate":
        raise UserError(f"--num_beams {options.num_beams} is for --task translate; {run} does --task {record['task']}: leave it out")
    errors.check_writable(run)
    kind = tasks.module(record["task"])
    source, rows, label = told_here("rows", held_out_rows, options, record, kind)
    used = record["model"]["used"]
    dtype = models.dtype(options.dtype)
    tokenizer = models.load_run_tokenizer(run)
    task = tasks.of_run(record, tokenizer)
    # Functions, so that one model at a time is in memory.
    names = member_names([run, *others]) if others else [evaluation.own_name(record)]
    candidates = {name: partial(models.load_run, folder, dtype, task.auto_class, task.config, merge=True)
                  for name, folder in zip(names, (run, *others), strict=True)}
    if others:
        check_members(run, others, tokenizer, record)
        candidates["ensemble"] = partial(join, list(candidates.values()))
        label = "+".join([label, *(name.strip("/").replace("/", "-") for name in names[1:])])
    if options.base and kind.UNTUNED_SCORES:
        base = "start (drawn at random)" if tasks.flags(record).from_scratch else f"{used} (untuned)"
        candidates = {base: partial(models.load_base, run, dtype, task.auto_class, task.config), **candidates}
    print(f"{len(rows)} {kind.UNIT} from {source}")
    latency = {}
    if options.latency:
        candidates = {name: partial(timed, name, load, task, rows, record, options, latency) for name, load in candidates.items()}
    scores = told_here(source, kind.evaluate, candidates, task, rows, record, options)
    if processes.rank():
        return
    scores["source"] = source
    # The accuracy of these counts rows that are turned away, and their F1 takes a set of labels for one.
    other_scale = {"f1_macro"} if tasks.flags(record).multi_label else set()
    if "dev_oos_threshold" in record["metrics"]:
        other_scale = {"accuracy", "f1_macro"}
    scores["intervals"] = comparison.intervals(record["task"], scores["predictions"], scores["losses"], other_scale)
    if others and "dev_oos_threshold" in record["metrics"]:
        scores["notes"].append(f"the probability below which a row is turned away is that of {run}, for every model")
    scores["signature"] += f", {str(dtype).removeprefix('torch.')}"
    evaluation.print_table(scores)
    if options.slices:
        evaluation.print_slices(scores)
    evaluation.print_samples(scores, options.samples)
    predictions, losses = run / f"predictions-{label}.jsonl", run / f"losses-{label}.json"
    with errors.writing(run):
        checkpoints.write(predictions, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in scores.pop("predictions")))
        checkpoints.write(losses, json.dumps(runs.visible(scores.pop("losses")), ensure_ascii=False) + "\n")
    if options.latency:
        scores["latency"] = latency
        for name, seconds in latency.items():
            print(f"{name}: {seconds:.3f} s an answer, one at a time")
    record.setdefault("evaluation", {})[label] = scores
    with errors.writing(run):
        runs.write(run, record)
    if options.json:
        with errors.writing(f"--json {options.json}"):
            Path(options.json).write_text(json.dumps(runs.visible(scores), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    talk = f"  {runs.python()} scripts/chat.py --run {run}\n" if record["task"] == "chat" else ""
    print(f"\nall answers: {predictions}; report: {run / 'report.html'}\n"
          f"next:\n{talk}"
          f"  {runs.python()} -m tensorboard.main --logdir {run}\n"
          f"  {runs.python()} scripts/train.py   (lists the other recipes)")


def told_here(source: str, function, *args):
    """What `function` returns; its complaints about a row name the `source` of the rows, and a remedy that this script knows."""
    try:
        return function(*args)
    except UserError as error:
        text = re.sub(r"^rows(?=[,:] )", lambda _: source, str(error))
        text = re.sub(r" \((--oos_label .* takes it as out of scope, )?--on_bad_row skip [^()]*\)$", "; mend this row or take it out", text)
        raise UserError(text) from error


def timed(name: str, load, task, rows: list[dict], record: dict, options, latency: dict):
    """The model that `load` loads, after the first --latency rows were answered one at a time: `latency[name]` is the median in seconds.

    An answer is a reply to a dialogue's last question, a written target, or the labels of a row, with the reading of the row. The first
    row is answered once more before, as a first pass is slower than those that follow.
    """
    from recipes.common import generation, tasks
    from recipes.common.scoring import dataset_outputs

    model, seconds = load(), []
    for row in [rows[0], *rows[: options.latency]]:
        start = time.perf_counter()
        if task.name == "chat":
            limit = generation.limit(model, task.max_length, options.max_new_tokens)
            prompts = [prompt for _, _, prompt in generation.prompts_for([row], task.tokenizer, limit)[-1:] if prompt is not None]
            if not prompts:
                continue
            generation.replies(model, task.tokenizer, prompts, options.max_new_tokens, 1, f"Latency of {name}")
        elif task.name == "translate":
            tasks.module(task.name).write(name, model, task, [row], record, options)
        else:
            dataset_outputs(model, task, task.encode([row], "rows", "skip")[0], f"Latency of {name}")
        seconds.append(time.perf_counter() - start)
    latency[name] = statistics.median(seconds[1:] or [math.nan])
    return model


def join(loaders):
    """An ensemble of the models that `loaders` load, all in memory."""
    from recipes.common.losses import Ensemble

    return Ensemble([load() for load in loaders])


def member_names(folders: list[Path]) -> list[str]:
    """A name for each run: that of its folder, or the whole path where two would be called the same."""
    from recipes.common import evaluation

    names = [evaluation.beside_columns(folder.resolve().name) for folder in folders]
    return names if len({*names, "ensemble"}) > len(names) else [str(folder.resolve()) for folder in folders]


def check_members(run: Path, others: list[Path], tokenizer, record: dict) -> None:
    """Raise `UserError` unless all runs do the same task with the same tokens and labels, so that their probabilities can be averaged."""
    from recipes.common import models, tasks

    if len({path.absolute().resolve() for path in (run, *others)}) <= len(others):
        raise UserError("--run: the same run is named twice")
    for other in others:
        theirs = models.read_record(other)
        if theirs["task"] != record["task"]:
            raise UserError(f"--run {other} does --task {theirs['task']}, {run} --task {record['task']}: they can't answer together")
        tokens = models.load_run_tokenizer(other)
        if tokens.get_vocab() != tokenizer.get_vocab() or tokens.chat_template != tokenizer.chat_template:
            raise UserError(f"--run {other} and {run} have different tokens or chat templates: they can't answer together")
        if list(theirs["data"].get("labels", [])) != list(record["data"].get("labels", [])):
            raise UserError(f"--run {other} and {run} know different labels: they can't answer together")
        for flag in READ_ALIKE:
            if getattr(tasks.flags(theirs), flag) != getattr(tasks.flags(record), flag):
                raise UserError(f"--run {other} and {run} were trained with different --{flag}: they can't answer together")


def parse(argv=None):
    """The command line of this script."""
    parser = args.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", required=True, action="append",
                        help="the run folder (--output_dir of the training); several: each alone, and together by mean probabilities")
    parser.add_argument("--data", help="a file, folder or Hub id (default: the data of the run)")
    parser.add_argument("--columns", help="rename columns of --data, NEW=OLD: source=question,target=answer")
    parser.add_argument("--split", metavar="SPLIT", help="which rows: train, dev or test (default: test, or dev where there is no test "
                        "file); dev=NAME or test=NAME: that file or split of --data, whatever its name")
    parser.add_argument("--data_timeout", type=args.whole, default=600, metavar="S",
                        help="stop when no row has come for so many seconds (default: 600; 0: wait for ever)")
    parser.add_argument("--limit", type=args.positive, help="only the first N dialogues")
    parser.add_argument("--base", action="store_true", help="score the untuned model on the same dialogues as well")
    parser.add_argument("--max_new_tokens", type=args.positive, default=128, help="longest reply (default: 128)")
    parser.add_argument("--batch_size", type=args.positive, default=32, help="replies generated at a time (default: 32)")
    parser.add_argument("--num_beams", type=args.positive, default=1, help="translate: beams of the search (default: 1, greedy)")
    parser.add_argument("--length_penalty", type=float, default=1.0,
                        help="with beams: the power of its length that divides a text's score; above 1 favours long ones (default: 1)")
    parser.add_argument("--no_repeat_ngram_size", type=args.whole, default=0,
                        help="with beams: write no N tokens twice in a text (default: 0, no such rule)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="what to compute in (default: bfloat16 where the hardware has it)")
    parser.add_argument("--samples", type=args.whole, default=3, help="replies shown at the end (default: 3); the report has 20")
    parser.add_argument("--slices", action="store_true",
                        help="show the scores of parts of the rows too: by intent, sentiment, language, turn, length (the report has them)")
    parser.add_argument("--latency", type=args.whole, default=0, metavar="N",
                        help="also time N answers one at a time, and show the median (default: 0, none)")
    parser.add_argument("--json", metavar="OUT", help="write the scores to this file as well")
    options = parser.parse_args(argv)
    options.split, equals, options.named = (options.split or "").partition("=")
    if (options.split or equals) and options.split not in (("dev", "test") if equals else ("train", "dev", "test")):
        parser.error(f"--split {options.split}{equals}{options.named}: choose train, dev or test, or with --data a split of another "
                     "name, as in test=NAME")
    if equals and not (options.data and options.named):
        parser.error(f"--split {options.split}={options.named} names a split of other data: give --data, and its name after the =; the "
                     "names that the run was trained with are known")
    if options.latency and processes.count() > 1:
        raise UserError(f"--latency {options.latency} needs the machine for itself, and {processes.count()} processes share it: use one")
    for flag, unused in (("length_penalty", 1), ("no_repeat_ngram_size", 0)):
        if options.num_beams == 1 and getattr(options, flag) != unused:
            parser.error(f"--{flag} {getattr(options, flag):g} is a rule of the beam search: give --num_beams 2 or more with it")
    if not math.isfinite(options.length_penalty):
        parser.error(f"--length_penalty {options.length_penalty} must be a number, such as 0.9")
    if options.num_beams > 1 and len(options.run) > 1:
        parser.error("--num_beams: several runs write together greedily; leave it out")
    return options


def held_out_rows(options, record, kind) -> tuple[str, list[dict], str]:
    """The task's rows to score on, after where they are from and before a name for the results. A file given by --data is taken whole."""
    from recipes.common import data, evaluation, tasks

    shared, training = tasks.flags(record), record["training_arguments"]
    given, check = options.data or shared.data, kind.check(shared)
    how = (shared.on_bad_row, options.columns if options.data else vars(shared).get("columns"))  # runs of before have none
    # Other data must not replace the scores on the run's own, so its name goes into theirs.
    other = Path(options.data).absolute() if options.data else None
    prefix = f"{other.name}-" if other else ""
    if other and other.is_file():
        if options.split:
            raise UserError(f"--split {options.split}: a file given by --data is scored whole; leave --split out")
        found, label = data.read(Path(options.data), check, *how), f"{other.parent.name}-{other.stem}"
    else:
        named = given if isinstance(given, str) else " ".join(given)
        names = shared.split if not options.data else f"{options.split}={options.named}" if options.named else None
        sources = data.find_all(given, split=names)
        split = options.split or ("test" if any("test" in files for files in sources) else "dev")
        label = prefix + (options.named or split)
        drawn = split != "test" and any("dev" not in files for files in sources)  # held out at training time: the same draw again
        if drawn and not options.data and shared.streaming:
            raise UserError(f"{named} was streamed, so the rows held out can't be told from the others: give rows with --data FILE")
        found = data.load_split(given, split, check, shared.dev_fraction, training["seed"], *how, names)
        if found is None:
            raise UserError(f"{named} has no test file: use --split dev, or --data FILE")
        if drawn and not options.data and found.sha256 != record["data"]["splits"][split]["sha256"]:
            raise UserError(f"{named} has changed since the training, so the rows held out then can't be told from the others: "
                            "give rows that the run has not seen with --data FILE")
    for sentence in found.notes:
        print(f"note: {sentence}")
    for sentence in found.skipped:
        print(f"skipped {sentence}")
    return found.source, kind.rows(found.rows, shared)[: options.limit], evaluation.file_name(label)


if __name__ == "__main__":
    sys.exit(main())
