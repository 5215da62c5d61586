"""Train several recipes on the same rows, seeds and budget, score them on the same held-out items, and say which to take:

    python scripts/compare.py --recipes full lora prefix adapter --model smollm2 --seeds 3 --budget steps:100 --output_dir runs/compare

All flags that are not this script's go to every recipe (--task, --data, --max_length ...); those of one recipe stand in --grid. Each
training and each scoring is a process of its own, whose output is in OUT/logs. Started again with the same flags, the script goes on:
finished runs are reused, broken ones continued; recipes, seeds, settings and fractions may be added. A run that fails is shown as failed
and stops no other; the exit status is 1 only if no run ended well. The checkpoints of a finished run are deleted. Ctrl-C ends the step,
with a checkpoint from which the same command goes on.

--budget steps:N trains N steps; tokens:N about N tokens, with a whole schedule; minutes:N as many steps as the time allows. A schedule
would be cut there, so the learning rate is then constant after 10 steps, unless --lr_scheduler_type says otherwise. Without a budget, each
recipe trains --num_train_epochs.

--grid RECIPE.FLAG=V1,V2 (several combine) trains each combination with the first seed and goes on with the best on dev; one value alone
sets the flag. --search N lets Optuna choose those that are not set, by N trials on dev for each recipe (recipes/common/search.py), the
learning rate around the one that is set. Neither looks at test rows.
Both judge by --metric where it is measured on dev while training (of written answers, with --eval_generate_rows), else by the dev loss.

--data_fractions 0.25,0.5,1 also trains on shares of the rows, each part of the next, and tells what more data would bring.

Written are OUT/compare.md, the table, OUT/report.html, the pictures, and OUT/compare.json, the record of it all:

    python -m json.tool runs/compare/compare.json

command, finished, task, model {requested, used}, data {train, dev: as in run.json}, doctor (as in run.json) or null, configuration {flag:
  value} of all recipes, split, source, items, unit, seeds, budget, flags, report_language;
main_metric, metrics {metric: {title, unit, higher_is_better, digits}}, best {metric: system};
systems: a list of {name, recipe, base, settings, configuration {flag: value}, status (done, partly or failed), runs: [{name, folder, seed,
  status (done or failed), error, log, reused, still_improving, seconds, steps, tokens, dev: {...}, history}],
  scores: {metric: {mean, low, high, deviation, seeds, against_best, against_base: {difference, low, high, p, p_holm} or null}} or null,
  costs: {trainable_parameters, total_parameters, seconds, tokens_per_second, peak_memory_mb, disk_mb, latency}};
  base is true, and runs empty, for the untuned model, and for one of classify that knows nothing but how frequent each label is;
grid: a list of {system, by (grid or search), metric, points: [{settings, value on dev or null, chosen, run}]};
learning_curves: a list of {system, metric, points: [{rows, value, low, high}], fit {a, b, c} or null,
  extrapolation: [{factor, rows, value, low, high, gain, gain_low, gain_high}], sentence};
samples: a list of {context: [[who, text]], reference, answers: {system: text}}; advice, notes: sentences; hardware, versions.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, comparison_runs, errors
from recipes.common.comparison_runs import Run, as_flags, judged_by_loss
from recipes.common.errors import UserError
from recipes.common.redaction import redacted
from recipes.common.search import file_of, recipe_of
from recipes.common.wording import LANGUAGES

LENGTHS = ("max_steps", "num_train_epochs", "max_tokens", "max_minutes")


def main():
    errors.install()
    options, flags = parse()
    plan = check(options, flags)
    out = Path(options.output_dir)
    language = options.language or language_before(out)
    begin(out, plan)
    grid, chosen = comparison_runs.choose(plan, out)
    wanted = [Run(system, seed, settings, share) for system, settings in chosen.items() for share in plan.fractions
              for seed in plan.seeds]
    results = {run: comparison_runs.train(run, plan, out, f"{i} of {len(wanted)}") for i, run in enumerate(wanted, start=1)}
    base_with = None
    for run, result in results.items():
        if result["status"] == "done":
            comparison_runs.score(run, result, plan, out, plan.base and base_with is None)
            if plan.base and base_with is None and result["status"] == "done":
                base_with = run
    from recipes.common import checkpoints, comparison, comparison_record, report, runs

    record = redacted(comparison_record.collect(plan, chosen, grid, results, base_with, out) | {"report_language": language})
    with errors.writing(out):
        runs.write_json(out / "compare.json", record)
        checkpoints.write(out / "compare.md", comparison.markdown(record))
        checkpoints.write(out / "report.html", report.render_comparison(runs.visible(record), record["report_language"]))
    show(record, out)
    return 0 if any(system["scores"] for system in record["systems"] if not system["base"]) else 1


def language_before(out: Path) -> str:
    """The language of the report in OUT, which scripts/report.py may have chosen; "en" where there is none. Raises `UserError`."""
    path = out / "compare.json"
    if not path.is_file():
        return "en"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("report_language", "en")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it; the runs are kept") from error


def parse(argv: list[str] | None = None):
    """(the flags of this script, those for all recipes)."""
    parser = args.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--recipes", nargs="+", required=True, metavar="RECIPE", help="files of recipes/, or any .py file")
    parser.add_argument("--output_dir", default="runs/compare", help="folder of the comparison (default: runs/compare)")
    parser.add_argument("--seeds", type=args.positive, default=1, help="repetitions: --seed and those that follow it (default: 1)")
    parser.add_argument("--budget", help="steps:N, tokens:N or minutes:N for each run")
    parser.add_argument("--metric", help="what decides (default: chat and pretrain: loss, classify: accuracy, tag: f1, translate: bleu)")
    parser.add_argument("--grid", action="append", default=[], metavar="RECIPE.FLAG=V1,V2", help="settings to choose from, on dev")
    parser.add_argument("--search", type=args.whole, default=0, metavar="N", help="let Optuna choose settings, by N trials each, on dev")
    parser.add_argument("--data_fractions", default="1", help="shares of the train rows, as in 0.25,0.5,1 (default: 1)")
    parser.add_argument("--limit", type=args.positive, help="score the first N held-out rows only")
    parser.add_argument("--max_new_tokens", type=args.positive, default=128, help="longest reply (default: 128)")
    parser.add_argument("--samples", type=args.whole, default=20, help="held-out items kept with every system's answer (default: 20)")
    parser.add_argument("--language", choices=LANGUAGES, help="of report.html: en or zh (default: as before, en at first)")
    parser.add_argument("--hardware", metavar="FILE", help="train through accelerate with this file of recipes/accelerate/")
    options, flags = parser.parse_known_args(argv)
    return options, args.underscored(flags)


# What is to be done, known before anything is trained


def check(options, flags: list[str]) -> SimpleNamespace:
    """What is to be trained, once every flag of every run has been understood. Raises `UserError`."""
    if options.hardware and not Path(options.hardware).is_file():
        raise UserError(f"--hardware {options.hardware}: no such file; recipes/accelerate/ holds some")
    if options.hardware:  # this process trains nothing: it needs no group of GPUs to look at the flags
        os.environ["CUDA_VISIBLE_DEVICES"] = comparison_runs.CHILDREN.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    from recipes.common import data, item_scores, models, tasks

    paths = {path.stem: path for path in map(file_of, options.recipes)}
    if len(paths) < len(options.recipes):
        raise UserError(f"--recipes {' '.join(options.recipes)}: two have the same name; give each file a name of its own")
    modules = {name: recipe_of(path) for name, path in paths.items()}
    given = {word.split("=")[0].removeprefix("--") for word in flags if word.startswith("--")}
    if "train_fraction" in given:
        raise UserError("--train_fraction: use --data_fractions, as in 0.25,0.5,1")
    common = [*flags, *budget(options.budget, given)]
    grid = settings_of(options.grid, modules)
    if options.search and options.hardware:
        raise UserError("--search trains in one process: leave --hardware out, or choose the settings with --grid")
    if options.search and any(len(points) > 1 for points in grid.values()):
        raise UserError("--search chooses the settings that --grid would choose from: leave one of them out")
    said, methods = io.StringIO(), []
    with contextlib.redirect_stdout(said):
        for name, module in modules.items():
            for settings in grid[name]:
                shared, method, training = understood(name, module, [*common, *as_flags(settings)])
                methods.append(method)
    print("".join(dict.fromkeys(said.getvalue().splitlines(keepends=True))), end="")  # a note that all of them make is shown once
    fractions = sorted(map(share, options.data_fractions.split(",")))
    if fractions[-1] != 1 or len(set(fractions)) < len(fractions):
        raise UserError(f"--data_fractions {options.data_fractions}: name each share once, and 1, all rows, among them")
    metric = options.metric or item_scores.OF_TASK[shared.task][0]
    # The F1 of item_scores takes a set of labels for one.
    known = [name for name in item_scores.OF_TASK[shared.task] if not (shared.multi_label and name == "f1_macro")]
    if metric not in known:
        raise UserError(f"--metric {metric}: --task {shared.task}{' with --multi_label' * shared.multi_label} has {', '.join(known)}")
    dev_metric = metric if metric in args.dev_scores(shared) else "loss"
    if dev_metric != metric and (options.search or any(len(points) > 1 for points in grid.values())):
        print(f"note: {judged_by_loss(metric)}")
    kind = tasks.module(shared.task)
    sources = data.find_all(shared.data, split=shared.split)
    split = "test" if any("test" in files for files in sources) else "dev"
    if split == "dev" and any("dev" not in files for files in sources):
        if options.seeds > 1:
            raise UserError("--seeds: the data has no test file, and each seed would hold out other rows: give a folder with a test or dev "
                            "file, or use --seeds 1")
        if shared.streaming:
            raise UserError("--streaming: the data has no test file, and the rows that a stream holds out can't be told from the others "
                            "afterwards: give a folder with a test or dev file")
    # A model or a run that can't be had is known before the first training.
    if shared.start_from:
        run = Path(shared.start_from)
        source = models.source_of_run(run, models.read_record(run, "--start_from"))
    else:
        source = models.resolve(shared.model, shared.fallback_model, weights=not shared.from_scratch)
    lengths = {tasks.longest(kind, source, method) for method in methods}
    if len(lengths) > 1 and not shared.max_length:
        common += ["--max_length", str(min(lengths))]
        print(f"note: --max_length {min(lengths)} for all, as that is what one of them leaves of the window of {source.used}: each is to "
              "read as much of a row")
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    return SimpleNamespace(options=options, common=common, paths=paths, hashes=hashes, grid=grid, fractions=fractions, metric=metric,
                           dev_metric=dev_metric, shared=shared, kind=kind, split=split, base=kind.UNTUNED_SCORES,
                           seeds=list(range(training.seed, training.seed + options.seeds)))


def budget(text: str | None, given: set[str]) -> list[str]:
    """The flags that --budget stands for. Raises `UserError`."""
    if text is None:
        return []
    kind, _, amount = text.partition(":")
    if kind not in ("steps", "tokens", "minutes") or not re.fullmatch(r"\d+" if kind != "minutes" else r"\d+(\.\d+)?", amount) \
            or float(amount) == 0:
        raise UserError(f"--budget {text}: write steps:N, tokens:N or minutes:N, as in steps:100")
    if clash := [name for name in LENGTHS if name in given]:
        raise UserError(f"--budget says how long to train: leave --{clash[0]} out")
    if kind != "minutes":
        return [f"--max_{kind}", amount]
    constant = ["--lr_scheduler_type", "constant_with_warmup"] if "lr_scheduler_type" not in given else []
    warmup = ["--warmup_steps", "10"] if constant and "warmup_steps" not in given else []
    return ["--max_minutes", amount, "--num_train_epochs", "1000", *constant, *warmup]


def share(text: str) -> float:
    """A share of the rows. Raises `UserError`."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number <= 1:
        raise UserError(f"--data_fractions: {text!r} is no share: use numbers above 0 and up to 1, as in 0.25,0.5,1")
    return number


def settings_of(grid: list[str], modules: dict) -> dict[str, list[tuple]]:
    """The combinations of --grid for each recipe: tuples of (flag, value). Raises `UserError`."""
    axes = {name: {} for name in modules}
    for text in grid:
        left, _, values = text.partition("=")
        name, _, flag = left.rpartition(".")
        if name not in axes or not values or not all(values.split(",")):
            raise UserError(f"--grid {text}: write RECIPE.FLAG=V1,V2 with one of the --recipes ({', '.join(axes)}), as in lora.rank=4,8")
        known = [f.name for f in fields(modules[name].MethodArguments)]
        if flag not in known:
            raise UserError(f"--grid {text}: {name} has no flag {flag} of its own, but {', '.join(known)}; flags for all recipes are given "
                            "as such")
        if flag in axes[name]:
            raise UserError(f"--grid {text}: {name}.{flag} is given twice; put all values into one")
        axes[name][flag] = values.split(",")
    return {name: [tuple(zip(own, point, strict=True)) for point in itertools.product(*own.values())] for name, own in axes.items()}


def understood(name: str, module, flags: list[str]):
    """(SharedArguments, MethodArguments, TrainingArguments) of the recipe for these flags. Raises `UserError` for what it refuses."""
    before = sys.argv
    sys.argv = [f"{name}.py"]
    try:
        return args.parse(module.__doc__, module.MethodArguments, [*flags, "--output_dir", "unused"])
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    finally:
        sys.argv = before


def begin(out: Path, plan) -> None:
    """Make the folder, or find that it holds this comparison. Raises `UserError` for one of other flags."""
    now = {"flags": redacted(plan.common), "hardware": plan.options.hardware, "recipes": plan.hashes}
    path = out / "plan.json"
    if path.is_file():
        then = json.loads(path.read_text(encoding="utf-8"))
        for key in ("flags", "hardware"):
            if then[key] != now[key]:
                raise UserError(f"--output_dir {out} holds a comparison with other flags ({' '.join(map(str, then[key] or ['none']))}): "
                                "name another folder")
        if changed := [name for name in now["recipes"] if then["recipes"].get(name, now["recipes"][name]) != now["recipes"][name]]:
            raise UserError(f"--output_dir {out} holds runs of another version of {plan.paths[changed[0]]}: name another folder")
        now["recipes"] = then["recipes"] | now["recipes"]
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output_dir {out} holds files that are no comparison's: name a new folder")
    from recipes.common import checkpoints

    with errors.writing(f"--output_dir {out}"):
        (out / "logs").mkdir(parents=True, exist_ok=True)
        checkpoints.write(path, json.dumps(now, indent=2) + "\n")


def show(record: dict, out: Path) -> None:
    """The table and what it means, on the screen."""
    from recipes.common import comparison

    if record["items"]:
        print(f"\n{record['items']} {record['unit']} from {record['source']}\n\n{comparison.screen(record)}\n")
        for system in record["systems"]:
            if system["settings"]:
                print(f"{system['name']}: {comparison.settings(system['settings'])}")
        for note in comparison.notes(record):
            print(f"note: {note}")
    print()
    for line in record["advice"]:
        print(line)
    print(f"\npictures and answers side by side: {out / 'report.html'}; tables: {out / 'compare.md'}, {out / 'compare.json'}; "
          f"logs in {out / 'logs'}")


if __name__ == "__main__":
    sys.exit(main())
