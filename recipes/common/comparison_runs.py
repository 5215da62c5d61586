"""The runs of a comparison: each training and each scoring a process of its own, and the settings chosen on dev.

`plan` is what scripts/compare.py made of its flags (`check`), `out` the folder of the comparison. The result of a run is {"status" (done
or failed), "error", "log", "reused", "record" (its run.json)}.
"""

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
from dataclasses import dataclass
from pathlib import Path

from recipes.common import errors, evaluation
from recipes.common.errors import UserError
from recipes.common.redaction import redacted

ROOT = Path(__file__).resolve().parents[2]
TIMED = 5  # answers one at a time, for the latency
CHILDREN = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}  # the environment of the processes


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
    told = [found[1] for line in lines if (found := re.search(r"(?:^|\])error: (.*)", line))]  # a bar ends no line
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


def judged_by_loss(metric: str) -> str:
    """Why settings are chosen by another score than the one that decides."""
    return f"settings are chosen by dev loss, as {metric} is not measured while training: --eval_generate_rows 32 measures it"


def choose(plan, out: Path) -> tuple[list[dict], dict[str, tuple]]:
    """(what was tried, recipe -> its settings): the only ones there are, or the best on dev by --grid or --search."""
    tried, chosen = [], {}
    for name, points in plan.grid.items():
        chosen[name] = points[0]
        if plan.options.search:
            tried.append(searched(name, points[0], plan, out))
            found = next((point["settings"] for point in tried[-1]["points"] if point["chosen"]), {})
            chosen[name] = tuple((dict(points[0]) | found).items())
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
    """The trials of Optuna for this recipe with the settings `fixed`, made anew only if there are none for these."""
    metric, run = plan.dev_metric, Run(name, plan.seeds[0], fixed)
    path, log = out / f"search-{run.name}-{plan.options.search}-{metric}.json", out / "logs" / f"search-{run.name}.log"
    print(f"[{name}] search by {plan.options.search} trials: ", end="", flush=True)
    if not path.is_file():
        command = [sys.executable, "-m", "recipes.common.search", "--recipe", str(plan.paths[name]), "--trials", str(plan.options.search),
                   "--metric", metric, "--result", str(path), *plan.common, *run.flags, "--output_dir", str(out / f"search-{run.name}")]
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
