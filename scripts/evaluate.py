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
from recipes.common.wording import counted


def main():
    errors.install()
    options = parse()
    args.check_launch()
    from recipes.common import checkpoints, comparison, deadline, ensembles, evaluation, models, runs, tasks

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
    dtype = models.dtype(options.dtype)
    folders = [run, *others]
    records = [record, *map(models.read_record, others)]
    tokenizers = [*map(models.load_run_tokenizer, folders)]
    ensembles.check(folders, records, tokenizers)
    read = [tasks.of_run(own, tokenizer) for own, tokenizer in zip(records, tokenizers, strict=True)]
    task = read[0]
    names = member_names(folders) if others else [evaluation.own_name(record)]
    candidates = {}
    for name, folder, own, its in zip(names, folders, records, read, strict=True):
        load = partial(models.load_run, folder, dtype, its.auto_class, its.config, merge=True)
        candidates[name] = evaluation.Candidate(load, its, own["metrics"].get("dev_oos_threshold"))
    notes = []
    if others:
        candidates["ensemble"] = evaluation.Candidate(partial(ensembles.load, [own.load for own in candidates.values()]),
                                                      ensembles.task_of(read), *threshold_of_all(folders, records, kind, notes))
        unlike = with_other_dev_rows(folders, records)
        if unlike and label == "dev" and not options.data:
            notes.append(f"{unlike} held other dev rows back than {run}, and may have been trained on the rows scored here: its scores and "
                         "the ensemble's say nothing then; give rows that no run has seen with --data FILE")
        label = evaluation.file_name("+".join([label, *(name.strip("/").replace("/", "-") for name in names[1:])]))
    if options.base and kind.UNTUNED_SCORES:
        untuned = partial(models.load_base, run, dtype, task.auto_class, task.config)
        candidates = {evaluation.base_name(record): evaluation.Candidate(untuned, task), **candidates}
    print(f"{counted(len(rows), kind.UNIT)} from {source}")
    latency = {}
    if options.latency:
        candidates = {name: own._replace(load=partial(timed, name, own, rows, record, options, latency))
                      for name, own in candidates.items()}
    scores = told_here(source, kind.evaluate, candidates, task, rows, record, options)
    if processes.rank():
        return
    scores["source"] = source
    # The accuracy of these counts rows that are turned away, and their F1 takes a set of labels for one.
    other_scale = {"f1_macro"} if tasks.flags(record).multi_label else set()
    if "dev_oos_threshold" in record["metrics"]:
        other_scale = {"accuracy", "f1_macro"}
    scores["intervals"] = comparison.intervals(record["task"], scores["predictions"], scores["losses"], other_scale)
    items = {name: int(sum(n for _, n in own.values())) for name, own in scores["losses"].items()}
    if len({*items.values()}) > 1:
        notes.append("the losses are not of the same items, as the runs' --max_length differ, so they can't be compared: "
                     + ", ".join(f"{name} {n:,}" for name, n in items.items()))
    scores["notes"] += notes
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


def timed(name: str, candidate, rows: list[dict], record: dict, options, latency: dict):
    """The model of `candidate`, after the first --latency rows were answered one at a time: `latency[name]` is the median in seconds.

    An answer is a reply to a dialogue's last question, a written target, or the labels of a row, with the reading of the row. The first
    one is given twice, as a first pass is slower than those that follow. A row of which nothing can be read is left out.
    """
    from recipes.common import generation, tasks
    from recipes.common.scoring import dataset_outputs

    model, task, seconds = candidate.load(), candidate.task, []
    alone = {"outside_alone": True} if task.name == "classify" else {}  # a row out of scope is answered like any other
    for row in (row for row in rows[: options.latency] for _ in range(1 if seconds else 2)):
        start = time.perf_counter()
        try:
            features, _ = task.encode([row], "rows", "skip", **alone)
        except UserError:
            continue
        if task.name in args.WRITING:  # reads the row once more, up to what is asked
            start = time.perf_counter()
        if task.name == "chat":
            _, asked = tasks.module(task.name).asked(model, task, [row], options.max_new_tokens)
            prompts = [prompt for _, _, prompt in asked[-1:] if prompt is not None]
            if not prompts:
                continue
            generation.replies(model, task.tokenizer, prompts, options.max_new_tokens, 1, f"Latency of {name}")
        elif task.name == "translate":
            tasks.module(task.name).write(name, model, task, [row], record, options)
        else:
            dataset_outputs(model, task, features, f"Latency of {name}")
        seconds.append(time.perf_counter() - start)
    latency[name] = statistics.median(seconds[1:] or [math.nan])
    return model


def threshold_of_all(folders: list[Path], records: list[dict], kind, notes: list[str]) -> tuple[float | None, list | None]:
    """(the threshold of an ensemble for rows out of scope; else dev rows to set it by, as a single run's is: those of the first run). What
    is to be said of it goes into `notes`.

    A mean of probabilities is less sure than its parts, so no member's own threshold would turn away as many.
    """
    from recipes.common import tasks

    own = [record["metrics"].get("dev_oos_threshold") for record in records]
    if None in own:
        return None, None
    try:
        found = dev_rows(records[0], kind)
    except (UserError, OSError) as error:
        mean = statistics.mean(own)
        notes.append(f"ensemble: its threshold is the mean of its members', as {folders[0]}'s dev rows are not to be had ({error}); the "
                     "ensemble is less sure than its members, so that it turns away more")
        return mean, None
    if unlike := with_other_dev_rows(folders, records):
        notes.append(f"ensemble: its threshold is set on {folders[0]}'s dev rows, and {unlike} had others: where some of them were trained "
                     "on, it is too high")
    return None, kind.rows(found, tasks.flags(records[0]))[: tasks.flags(records[0]).max_eval_samples]


def with_other_dev_rows(folders: list[Path], records: list[dict]) -> str:
    """The runs, with commas between them, whose dev rows are not those of the first run, and may be among those they were trained on."""
    def dev(record):
        splits, training = record["data"]["splits"], record["training_arguments"]
        drawn = splits["dev"]["sha256"] == splits["train"]["sha256"]  # of the same file, by seed
        return splits["dev"]["sha256"], *((training["seed"], record["shared_arguments"]["dev_fraction"]) if drawn else ())

    return ", ".join(str(folder) for folder, record in zip(folders, records, strict=True) if dev(record) != dev(records[0]))


def dev_rows(record: dict, kind) -> list[dict]:
    """The rows of the file that a run's dev rows were. Raises `UserError` if they can't be had any more."""
    from recipes.common import data, tasks

    shared = tasks.flags(record)
    if shared.streaming:
        raise UserError("they were streamed")
    found = data.load_split(shared.data, "dev", kind.check(shared), shared.dev_fraction, record["training_arguments"]["seed"],
                            shared.on_bad_row, vars(shared).get("columns"), shared.split)
    if found.sha256 != record["data"]["splits"]["dev"]["sha256"]:
        raise UserError("they have changed since the training")
    return found.rows


def member_names(folders: list[Path]) -> list[str]:
    """A name for each run: that of its folder, or the whole path where two would be called the same."""
    from recipes.common import evaluation

    names = [evaluation.beside_columns(folder.resolve().name) for folder in folders]
    return names if len({*names, "ensemble"}) > len(names) else [str(folder.resolve()) for folder in folders]


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
