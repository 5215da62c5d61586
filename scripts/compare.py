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
sets the flag. --search N lets Optuna choose, by N trials on dev for each recipe (recipes/common/search.py). Neither looks at test rows.
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
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, errors, evaluation
from recipes.common.errors import UserError
from recipes.common.redaction import redacted
from recipes.common.search import file_of, recipe_of
from recipes.common.wording import LANGUAGES

ROOT = Path(__file__).resolve().parent.parent
RESAMPLES = 2000
TIMED = 5  # answers one at a time, for the latency
# Settings of the Trainer that decide how a recipe learns; the report shows them with the recipe's own flags.
HOW = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps",
       "weight_decay")
LENGTHS = ("max_steps", "num_train_epochs", "max_tokens", "max_minutes")


@dataclass(frozen=True)
class Run:
    """One training: a recipe with `settings` of its own flags, a seed, and a share of the train rows."""

    system: str  # the recipe's name
    seed: int
    settings: tuple[tuple[str, object], ...] = ()
    fraction: float = 1.0

    @property
    def name(self) -> str:
        """The name of its folder."""
        chosen = [f"{flag}={value:.4g}" if isinstance(value, float) else f"{flag}={value}" for flag, value in self.settings]
        share = [f"fraction={self.fraction:g}"] if self.fraction < 1 else []
        return evaluation.file_name(re.sub(r"[^\w.=-]", "_", "-".join([self.system, *chosen, *share, f"seed{self.seed}"])))

    @property
    def flags(self) -> list[str]:
        """Its flags beside those of all runs."""
        return [*as_flags(self.settings), "--seed", str(self.seed),
                *(["--train_fraction", f"{self.fraction:g}"] if self.fraction < 1 else [])]


def as_flags(settings: tuple) -> list[str]:
    """Settings as words of a command line."""
    return [word for flag, value in settings for word in (f"--{flag}", str(value))]


def main():
    errors.install()
    options, flags = parse()
    plan = check(options, flags)
    out = Path(options.output_dir)
    language = options.language or language_before(out)
    begin(out, plan)
    grid, chosen = choose(plan, out)
    wanted = [Run(system, seed, settings, share) for system, settings in chosen.items() for share in plan.fractions
              for seed in plan.seeds]
    results = {run: train(run, plan, out, f"{i} of {len(wanted)}") for i, run in enumerate(wanted, start=1)}
    base_with = None
    for run, result in results.items():
        if result["status"] == "done":
            score(run, result, plan, out, plan.base and base_with is None)
            if plan.base and base_with is None and result["status"] == "done":
                base_with = run
    record = collect(plan, chosen, grid, results, base_with, out)
    from recipes.common import checkpoints, comparison, report, runs

    record["report_language"] = language
    record = redacted(record)
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
    return parser.parse_known_args(argv)


# What is to be done, known before anything is trained


def check(options, flags: list[str]) -> SimpleNamespace:
    """What is to be trained, once every flag of every run has been understood. Raises `UserError`."""
    if options.hardware and not Path(options.hardware).is_file():
        raise UserError(f"--hardware {options.hardware}: no such file; recipes/accelerate/ holds some")
    if options.hardware:  # this process trains nothing: it needs no group of GPUs to look at the flags
        os.environ["CUDA_VISIBLE_DEVICES"] = CHILDREN.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
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
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for name, module in modules.items():
            for settings in grid[name]:
                shared, _, training = understood(name, module, [*common, *as_flags(settings)])
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
    if split == "dev" and options.seeds > 1 and any("dev" not in files for files in sources):
        raise UserError("--seeds: the data has no test file, and each seed would hold out other rows: give a folder with a test or dev "
                        "file, or use --seeds 1")
    if not shared.start_from:
        models.resolve(shared.model, shared.fallback_model)  # a model that can't be had is known before the first run
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    return SimpleNamespace(options=options, common=common, paths=paths, hashes=hashes, grid=grid, fractions=fractions, metric=metric,
                           dev_metric=dev_metric, shared=shared, kind=kind, split=split, base=kind.UNTUNED_SCORES,
                           seeds=list(range(training.seed, training.seed + options.seeds)))


def judged_by_loss(metric: str) -> str:
    """Why settings are chosen by another score than the one that decides."""
    return f"settings are chosen by dev loss, as {metric} is not measured while training: --eval_generate_rows 32 measures it"


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


# Training and scoring, a process each

CHILDREN = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}


def call(command: list[str], log: Path) -> int:
    """Run a command of this project, its output into `log`; its exit status.

    Ctrl-C or a signal that ends this script is handed to the command, which ends its step and writes a checkpoint; a second one ends it at
    once. It has a session of its own, as the terminal would send it Ctrl-C once more. Raises `UserError` when it has ended.
    """
    told = []

    def hand_on(number, frame):
        told.append(number)
        process.send_signal(signal.SIGTERM)
        print("\nstopping after this step (once more: at once) ...", flush=True)

    path = os.pathsep.join(filter(None, [str(ROOT), CHILDREN.get("PYTHONPATH")]))
    with errors.writing(log):
        log.write_text(shlex.join(command) + "\n", encoding="utf-8")
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=CHILDREN | {"PYTHONPATH": path},
                                   start_new_session=True)
        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                  if signal.getsignal(number) != signal.SIG_IGN}  # as nohup asks for
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    # accelerate launch repeats the whole command when it fails
    with errors.writing(log):
        log.write_text(redacted(log.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
    if told:
        raise UserError("interrupted; the same command goes on from here")
    return status


def why(status: int, log: Path) -> str:
    """What became of a process that failed: the signal that ended it, or what it said at last."""
    if status >= 0:
        return last_words(log)
    return f"ended by signal {signal.Signals(-status).name}" + (", as when memory runs out" if status == -signal.SIGKILL else "")


def last_words(log: Path) -> str:
    """What a failed process said at last: its sentence, or the end of its traceback."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines)[-1][:300]


def train(run: Run, plan, out: Path, position: str) -> dict:
    """Train `run`, or find it trained. Returns {"status", "error", "log", "reused", "record"}."""
    folder, log = out / run.name, out / "logs" / f"{run.name}.log"
    result = {"status": "done", "error": None, "log": str(log), "reused": (folder / "run.json").is_file(), "record": None}
    print(f"[{position}] {run.name}: ", end="", flush=True)
    if not result["reused"]:
        resume = ["--resume_from_checkpoint"] if any(folder.glob("checkpoint-*")) else []
        launcher = ["-m", "accelerate.commands.launch", "--config_file", plan.options.hardware] if plan.options.hardware else []
        begun = time.monotonic()
        status = call([sys.executable, *launcher, str(ROOT / "scripts/train.py"), "--recipe", str(plan.paths[run.system]), *plan.common,
                       *run.flags, "--output_dir", str(folder), *resume], log)
        if status and not (folder / "run.json").is_file():
            result |= {"status": "failed", "error": why(status, log)}
            print(f"FAILED after {time.monotonic() - begun:.0f} s: {result['error']} ({log})")
            return result
    for checkpoint in folder.glob("checkpoint-*"):  # several times the size of the model, and needed no more
        shutil.rmtree(checkpoint)
    record = result["record"] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    loss = float(record["metrics"]["dev_loss"])
    if not math.isfinite(loss):
        result |= {"status": "failed", "error": f"the training diverged: its dev loss is {loss}"}
        print(f"FAILED: {result['error']}")
        return result
    print(f"{'reused, ' if result['reused'] else ''}{record['steps']} steps in {record['seconds']:.0f} s, dev loss {loss:.4f}")
    return result


def score(run: Run, result: dict, plan, out: Path, base: bool) -> None:
    """Score `run` on the held-out rows, and the untuned model too if `base`, unless that has been done."""
    folder, log = out / run.name, out / "logs" / f"{run.name}.evaluate.log"
    how = ["--split", plan.split, "--max_new_tokens", str(plan.options.max_new_tokens), "--latency", str(TIMED), "--samples", "0",
           *(["--limit", str(plan.options.limit)] if plan.options.limit else [])]
    done = folder / "scored.json"  # how the run was scored last
    before = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    if before.get("how") == how and (before["base"] or not base) and plan.split in result["record"].get("evaluation", {}):
        return
    print(f"scoring {run.name}{' and the untuned model' if base else ''} ...", flush=True)
    if status := call([sys.executable, str(ROOT / "scripts/evaluate.py"), "--run", str(folder), *how, *(["--base"] if base else [])], log):
        result |= {"status": "failed", "error": f"scoring failed: {why(status, log)}", "log": str(log)}
        print(f"FAILED: {result['error']} ({log})")
        return
    result["record"] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    from recipes.common import checkpoints

    with errors.writing(folder):
        checkpoints.write(done, json.dumps({"how": how, "base": base}) + "\n")


# Choosing settings, on dev


def choose(plan, out: Path) -> tuple[list[dict], dict[str, tuple]]:
    """(what was tried, recipe -> its settings): the only ones there are, or the best on dev by --grid or --search."""
    tried, chosen = [], {}
    for name, points in plan.grid.items():
        chosen[name] = points[0]
        if plan.options.search:
            tried.append(searched(name, points[0], plan, out))
            chosen[name] += next((tuple(point["settings"].items()) for point in tried[-1]["points"] if point["chosen"]), ())
        elif len(points) > 1:
            tried.append(best_of(name, points, plan, out))
            chosen[name] = next((points[i] for i, point in enumerate(tried[-1]["points"]) if point["chosen"]), points[0])
    return tried, chosen


def best_of(name: str, points: list[tuple], plan, out: Path) -> dict:
    """Train each combination with the first seed; the best on dev by `plan.dev_metric`."""
    from recipes.common import item_scores

    results = [(run := Run(name, plan.seeds[0], settings), train(run, plan, out, f"{name}, settings {i} of {len(points)}"))
               for i, settings in enumerate(points, start=1)]
    metric = plan.dev_metric
    values = [float(result["record"]["metrics"][f"dev_{metric}"]) if result["status"] == "done" else None for _, result in results]
    best = (max if item_scores.METRICS[metric].higher_is_better else min)((v for v in values if v is not None), default=None)
    first = values.index(best) if best is not None else None
    return {"system": name, "by": "grid", "metric": metric, "points": [
        {"settings": dict(run.settings), "value": value, "chosen": i == first, "run": run.name}
        for i, ((run, _), value) in enumerate(zip(results, values, strict=True))]}


def searched(name: str, fixed: tuple, plan, out: Path) -> dict:
    """The trials of Optuna for this recipe, made anew only if there are none for these flags."""
    metric = plan.dev_metric
    path, log = out / f"search-{name}-{plan.options.search}-{metric}.json", out / "logs" / f"search-{name}.log"
    print(f"[{name}] search by {plan.options.search} trials: ", end="", flush=True)
    if not path.is_file():
        command = [sys.executable, "-m", "recipes.common.search", "--recipe", str(plan.paths[name]), "--trials", str(plan.options.search),
                   "--metric", metric, "--result", str(path), *plan.common, *Run(name, plan.seeds[0], fixed).flags,
                   "--output_dir", str(out / f"search-{name}")]
        if status := call(command, log):
            print(f"FAILED: {why(status, log)} ({log}); {name} is trained with its defaults")
            return {"system": name, "by": "search", "metric": metric, "points": []}
    found = json.loads(path.read_text(encoding="utf-8"))
    points = [{"settings": trial["settings"], "value": float(trial["value"]) if trial["state"] == "COMPLETE" else None,
               "chosen": trial["settings"] == found["best"], "run": None} for trial in found["trials"]]
    refused = [trial["why"] for trial in found["trials"] if "why" in trial]
    print(f"best dev {metric} {next(point['value'] for point in points if point['chosen']):.4f}"
          + (f"; {len(refused)} not trained ({refused[0]})" if refused else ""))
    return {"system": name, "by": "search", "metric": metric, "points": points}


# Putting it together


def collect(plan, chosen, grid, results, base_with, out: Path) -> dict:
    """The record: compare.json."""
    from recipes.common import comparison, item_scores, runs, statistics

    texts = {}  # run -> (the lines of its answers, its losses), for all that were scored
    for run, result in results.items():
        if result["status"] == "done":
            texts[run] = answers(out / run.name, plan.split)
    refuse_other_rows(texts, results, out)
    own = {name: [run for run in results if run.system == name and run.fraction == 1] for name in chosen}
    scored = {name: [run for run in wanted if run in texts] for name, wanted in own.items()}
    counts = {run: counts_of(plan, texts[run], evaluation.own_name(result["record"])) for run, result in results.items()
              if run in texts}
    systems = {name: [counts[run] for run in members] for name, members in scored.items() if members}
    base, model = None, None
    if base_with:
        base, model = "untuned", f"{results[base_with]['record']['model']['used']} (untuned)"
    elif texts and plan.shared.task == "classify" and not plan.shared.multi_label:
        base = model = "label frequencies"
        base_with = next(iter(texts))
        add_frequencies(*texts[base_with], results[base_with]["record"]["data"]["labels"], model)
    if base:
        systems[base] = [counts_of(plan, texts[base_with], model)]
    items = len(next(iter(counts.values()))[plan.metric]) if counts else 0
    drawn = statistics.draws(items, RESAMPLES, 0) if items else None
    found = comparison.score(systems, base, drawn) if any(name != base for name in systems) else {}
    # What all runs have in common is told from one that saw all rows, if any did.
    first = next((results[run]["record"] for run in sorted(texts, key=lambda run: -run.fraction)), None)
    listed = [{"name": name, "recipe": str(plan.paths[name]), "base": False, "settings": dict(chosen[name]),
               "configuration": configuration([results[run]["record"] for run in scored[name][:1]]),
               "status": "done" if len(scored[name]) == len(wanted) else "partly" if scored[name] else "failed",
               "runs": [described(run, results[run], out) for run in wanted],
               "scores": {metric: table["systems"][name] for metric, table in found.items()} if name in systems else None,
               "costs": costs([(results[run]["record"], out / run.name) for run in scored[name]], plan)} for name, wanted in own.items()]
    if base and found:
        latency = results[base_with]["record"]["evaluation"][plan.split]["latency"].get(model)
        listed.append({"name": base, "recipe": None, "base": True, "settings": {}, "configuration": {}, "status": "done", "runs": [],
                       "scores": {metric: table["systems"][base] for metric, table in found.items()},
                       "costs": {"trainable_parameters": 0, "disk_mb": 0.0, "latency": latency and float(latency)}})
    record = {
        "command": runs.command(), "finished": datetime.now(UTC).isoformat(timespec="seconds"), "task": plan.shared.task,
        "model": first["model"] if first else {"requested": plan.shared.model, "used": None},
        "data": first["data"]["splits"] if first else {}, "doctor": first["data"].get("doctor") if first else None,
        "configuration": first["shared_arguments"] if first else {}, "split": plan.split,
        "source": first["evaluation"][plan.split]["source"] if first else None,
        "items": items, "unit": plan.kind.UNIT, "seeds": plan.seeds, "budget": plan.options.budget, "flags": plan.common,
        "main_metric": plan.metric,
        "metrics": {name: {key: getattr(item_scores.METRICS[name], key) for key in ("title", "unit", "higher_is_better", "digits")}
                    for name in found},
        "best": {metric: table["best"] for metric, table in found.items()}, "systems": listed, "grid": grid,
        "learning_curves": curves(plan, own, results, counts, drawn), "samples": [], "notes": [],
        "hardware": first["hardware"] if first else None, "versions": first["versions"] if first else None,
    }
    if found:
        record["samples"] = samples(plan, {name: (members[0], None) for name, members in scored.items() if members}
                                    | ({base: (base_with, model)} if base else {}), texts, results)
        for name, members in scored.items():
            for run in members:
                record["notes"] += cut_short(plan, results[run]["record"], evaluation.own_name(results[run]["record"]),
                                             run.name if len(members) > 1 else name)
        if base:
            record["notes"] += cut_short(plan, results[base_with]["record"], model, base)
        if plan.options.budget and plan.options.budget.startswith("minutes") and "constant_with_warmup" in plan.common:
            record["notes"].append("minutes: the learning rate is constant after the warm-up, as a schedule would be cut")
        if grid and plan.dev_metric != plan.metric:
            record["notes"].append(judged_by_loss(plan.metric))
        record["notes"] += [f"{entry['system']}: no settings could be chosen, as all that were tried failed: it has its defaults"
                            for entry in grid if not any(point["chosen"] for point in entry["points"])]
        record["notes"] += [f"{run.name} failed, so this point is missing: {result['error']}" for run, result in results.items()
                            if run.fraction < 1 and result["status"] == "failed"]
        if plan.fractions != [1]:
            record["notes"].append("shares of the data have the same budget as all of it: a small share is read more often")
        if any(len(curve["points"]) == 3 for curve in record["learning_curves"]):
            record["notes"].append("three amounts of data fit any such curve: a fourth would test it")
    record["advice"] = comparison.advice(record) + [f"{curve['system']}: {curve['sentence']}" for curve in record["learning_curves"]]
    return record


def answers(folder: Path, split: str) -> tuple[list[dict], dict]:
    """The lines of predictions-SPLIT.jsonl and the losses of losses-SPLIT.json of a scored run."""
    lines = evaluation.predictions((folder / f"predictions-{split}.jsonl").read_text(encoding="utf-8"))
    return lines, json.loads((folder / f"losses-{split}.json").read_text(encoding="utf-8"))


def add_frequencies(lines: list[dict], losses: dict, labels: dict[str, int], name: str) -> None:
    """Add the answers of a model that knows nothing but how often each label is among the train rows: it always says the most frequent."""
    total, frequent = sum(labels.values()), max(labels, key=labels.get)
    losses[name] = {}
    for line in lines:
        line[name] = frequent
        losses[name][line["row"]] = [-math.log(labels[line["label"]] / total), 1] if line["label"] in labels else [0.0, 0]


def refuse_other_rows(texts: dict, results: dict, out: Path) -> None:
    """Raise `UserError` unless all runs were trained and scored on the same rows."""
    def rows(run):
        lines, losses = texts[run]
        splits = results[run]["record"]["data"]["splits"]
        return ([splits[split]["sha256"] for split in ("train", "dev")], [(line["row"], line.get("turn")) for line in lines],
                [list(each) for each in list(losses.values())[-1:]])

    if other := [run for run in texts if rows(run) != rows(next(iter(texts)))]:
        raise UserError(f"{out / other[0].name} and {out / next(iter(texts)).name} saw other rows, as the data has changed between them: "
                        "compare anew in another --output_dir")


def counts_of(plan, text: tuple[list[dict], dict], model: str) -> dict:
    """The counts of each item for this model (item_scores.counts)."""
    from recipes.common import item_scores

    lines, losses = text
    counts = item_scores.counts(plan.shared.task, lines, losses[model], model)
    if plan.shared.multi_label:
        del counts["f1_macro"]  # it would be that of the combinations
    return counts


def described(run: Run, result: dict, out: Path) -> dict:
    """A run in the record."""
    from recipes.common import comparison

    record = result["record"] or {}
    return {"name": run.name, "folder": str(out / run.name), "seed": run.seed,
            **{key: result[key] for key in ("status", "error", "log", "reused")},
            "still_improving": comparison.still_improving(record.get("history", [])),
            **{key: record.get(key) for key in ("seconds", "steps", "tokens", "history")}, "dev": record.get("metrics")}


def cut_short(plan, record: dict, model: str, name: str) -> list[str]:
    """What the scoring of this model tells of its replies: how many were cut, as they did not end, or could not be written."""
    notes = record["evaluation"][plan.split]["notes"] if plan.shared.task in args.WRITING else []
    return [f"{name}: {note.removeprefix(f'{model}: ')}" for note in notes if note.startswith(f"{model}: ")]


def configuration(records: list[dict]) -> dict:
    """The flags of a recipe as its first run had them; none if no run ended well."""
    return {key: value for record in records for key, value in (
        record["method_arguments"] | {key: record["training_arguments"][key] for key in HOW}).items()}


def costs(finished: list[tuple[dict, Path]], plan) -> dict:
    """What the runs of a system cost, the mean over its seeds; memory the largest."""
    if not finished:
        return {}
    mean = {key: sum(record[key] for record, _ in finished) / len(finished) for key in ("seconds", "tokens_per_second")}
    latencies = [float(record["evaluation"][plan.split]["latency"][evaluation.own_name(record)]) for record, _ in finished]
    return {**{key: finished[0][0][key] for key in ("trainable_parameters", "total_parameters")}, **mean,
            "peak_memory_mb": max(record["peak_memory_mb"] for record, _ in finished), "disk_mb": disk_mb(finished[0][1]),
            "latency": sorted(latencies)[len(latencies) // 2]}


def disk_mb(folder: Path) -> float:
    """MB (10^6 bytes) of what has to be deployed: the weights and configs of the model, or of the adapter without the model below it."""
    names = ("adapter_model.safetensors", "adapter_config.json") if (folder / "adapter_config.json").is_file() else (
        "model*.safetensors*", "config.json", "generation_config.json")
    return sum(path.stat().st_size for name in names for path in folder.glob(name)) / 1e6


def curves(plan, own: dict, results: dict, counts: dict, drawn) -> list[dict]:
    """What more data would bring, for each system that was trained on shares of the data."""
    from recipes.common import comparison

    if plan.fractions == [1]:
        return []
    out = []
    for name in own:
        points = {}
        for run, result in results.items():
            if run.system == name and run in counts:
                points.setdefault(result["record"]["data"]["splits"]["train"]["kept"], []).append(counts[run])
        if points:
            out.append({"system": name, **comparison.learning_curve(plan.metric, points, drawn)})
    return out


def samples(plan, members: dict, texts: dict, results: dict) -> list[dict]:
    """Held-out items, evenly from the first to the last, with the answer of every system (of its first seed)."""
    by = {name: (texts[run][0], model or evaluation.own_name(results[run]["record"]))
          for name, (run, model) in members.items()}
    lines = next(iter(by.values()))[0]
    rows = held_out(plan) if plan.shared.task == "chat" else []
    out = []
    for i in evaluation.spread(len(lines), plan.options.samples):
        line = lines[i]
        if plan.shared.task == "chat":
            context = [[m["role"], m["content"]] for m in rows[line["row"]]["messages"][: line["turn"]]]
        else:
            context = [[key, line[key]] for key in ("context", "text", "text_pair", "source") if key in line]
        reference = next(line[key] for key in ("reference", "references", "label", "tags") if key in line)
        answers = {name: own[i][model] for name, (own, model) in by.items()}
        if plan.shared.task == "tag":  # the spans: nobody can tell which word is the seventh of a row of tags
            tokens = line["tokens"]
            context, reference = [["text", "".join(plan.kind.spaced(tokens))]], plan.kind.shown(tokens, reference)
            answers = {name: plan.kind.shown(tokens, tags) for name, tags in answers.items()}
        out.append({"context": context, "reference": reference, "answers": answers})
    return out


def held_out(plan) -> list[dict]:
    """The rows that were scored."""
    from recipes.common import data

    shared, kind = plan.shared, plan.kind
    found = data.load_split(shared.data, plan.split, kind.check(shared), shared.dev_fraction, plan.seeds[0], shared.on_bad_row,
                            shared.columns, shared.split)
    return kind.rows(found.rows, shared)


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
