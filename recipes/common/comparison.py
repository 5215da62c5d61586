"""Several systems on the same held-out items: what separates them, what they cost, and what follows from that. Pure functions of numbers.

A system is a recipe with its settings, trained with one or more seeds, or the untuned model. scripts/compare.py describes the record.
"""

import math

import numpy as np

from recipes.common import item_scores, statistics
from recipes.common.wording import counted

ALPHA = 0.05  # a difference counts when its corrected p-value is below this
RESAMPLES = 1000  # of the rows of one run
FEW_ITEMS = 50  # below this many items, percentile intervals are too narrow and most differences can't be seen
STILL_IMPROVING = 0.005  # a last evaluation that lowered the dev loss by more than this share says that training ended early
# Seeds below which a gain is not told: of simulated runs that differ by nothing but chance, 24 of 120 with one seed, 7 with two and 3 with
# three got an interval above 0, and one of 95 % should in 3.
SEEDS = 3
FACTORS = (2, 4)  # how many times the data the curve is carried on to

Counts = dict[str, np.ndarray]  # metric -> (items, k), of one run


def score(systems: dict[str, list[Counts]], base: str | None, drawn: np.ndarray) -> dict[str, dict]:
    """metric -> {"best": system, "systems": {system: {...}}}, over the same resamples `drawn` (resamples, items) for all.

    `systems` are lists of runs with different seeds. Each gets "mean", "low", "high" (statistics.resample), "deviation" over its seeds
    (None for one), "seeds" (the score of each run); and as "against_best" and "against_base" its "difference" from that system, the
    interval of it, "p" and, corrected for all comparisons with that system, "p_holm". The best is the best tuned one.
    """
    found = {}
    names = [metric for metric in item_scores.METRICS if all(metric in run for runs in systems.values() for run in runs)]
    for metric in names:
        kind, out, samples = item_scores.METRICS[metric], {}, {}
        for number, (name, runs) in enumerate(systems.items()):
            counts = [run[metric] for run in runs]
            each = [float(kind.score(run.sum(0))) for run in counts]
            samples[name] = statistics.resample(counts, kind.score, drawn, number)
            low, high = statistics.interval(samples[name])
            out[name] = {"mean": float(np.mean(each)), "low": low, "high": high, "seeds": each,
                         "deviation": float(np.std(each, ddof=1)) if len(each) > 1 else None}
        tuned = [name for name in out if name != base and math.isfinite(out[name]["mean"])]
        best = (max if kind.higher_is_better else min)(tuned, key=lambda name: out[name]["mean"], default=None)
        for reference, key in ((best, "against_best"), (base, "against_base")):
            for name in out:
                out[name][key] = None
            if reference is None:
                continue
            others = [name for name in out if name != reference]
            differences = [samples[name] - samples[reference] for name in others]
            p_values = [statistics.p_value(each) for each in differences]
            for name, each, p, corrected in zip(others, differences, p_values, statistics.holm(p_values), strict=True):
                low, high = statistics.interval(each)
                out[name][key] = {"difference": out[name]["mean"] - out[reference]["mean"], "low": low, "high": high, "p": p,
                                  "p_holm": corrected}
        found[metric] = {"best": best, "systems": out}
    return found


def intervals(task: str, lines: list[dict], losses: dict, left_out: set[str] = frozenset()) -> dict[str, dict]:
    """Model -> heading of a score -> {"value", "low", "high"}: how far each score would move on other rows like these.

    Of one run's answers, as evaluate.py writes them; `left_out` are metrics that these do not give.
    """
    found = {}
    for name, sums in losses.items():
        counts = {metric: values for metric, values in item_scores.counts(task, lines, sums, name).items() if metric not in left_out}
        drawn = statistics.draws(len(next(iter(counts.values()))), RESAMPLES, 0) if counts else None
        found[name] = {}
        for metric, values in counts.items():
            kind = item_scores.METRICS[metric]
            low, high = statistics.interval(statistics.resample([values], kind.score, drawn))
            found[name][kind.title] = {"value": float(kind.score(values.sum(0))), "low": low, "high": high}
    return found


def learning_curve(metric: str, points: dict[int, list[Counts]], drawn: np.ndarray) -> dict:
    """What more data would bring: a power law through the score at each number of train rows, carried on to FACTORS times the data.

    `points` is rows -> runs. Returns {"points", "extrapolation", "sentence"}; an extrapolation has "rows", "value", "gain" over the fit at
    all the data, and their intervals, over the resamples. They say nothing of whether the law holds that far. The sentence says that more
    data would help only where the interval of the gain is above 0 and holds the spread of SEEDS seeds.
    """
    kind = item_scores.METRICS[metric]
    sizes = sorted(points)
    counts = {size: [run[metric] for run in points[size]] for size in sizes}
    values = np.array([np.mean([kind.score(run.sum(0)) for run in counts[size]]) for size in sizes])
    samples = np.column_stack([statistics.resample(counts[size], kind.score, drawn, i) for i, size in enumerate(sizes)])
    shown = [{"rows": size, "value": float(value), **dict(zip(("low", "high"), statistics.interval(column), strict=True))}
             for size, value, column in zip(sizes, values, samples.T, strict=True)]
    curve = {"metric": metric, "points": shown, "fit": None, "extrapolation": []}
    if len(sizes) < 3:
        several = counted(len(sizes), "amount of data is|amounts of data are")
        return curve | {"sentence": f"can't tell what more data would bring: {several} too few for a curve"}

    def errors(scores):  # what falls with data: a loss, or what is missing to 100
        return 100 - scores if kind.higher_is_better else scores

    fits = statistics.power_law(np.array(sizes, dtype=float), errors(np.vstack([values, samples])))
    now = statistics.predict(fits, sizes[-1])
    for factor in FACTORS:
        then = statistics.predict(fits, factor * sizes[-1])
        gain, value = np.maximum(now - then, 0), errors(then)  # never below 0 but by rounding
        curve["extrapolation"].append({
            "factor": factor, "rows": factor * sizes[-1], "value": float(value[0]), "gain": float(gain[0]),
            **dict(zip(("low", "high"), statistics.interval(value[1:]), strict=True)),
            **dict(zip(("gain_low", "gain_high"), statistics.interval(gain[1:]), strict=True))})
    double = curve["extrapolation"][0]
    bounds = f"[{double['gain_low']:.{kind.digits}f}, {double['gain_high']:.{kind.digits}f}]"
    change = f"{'raise' if kind.higher_is_better else 'lower'} {kind.title} by about {double['gain']:.{kind.digits}f} {bounds}"
    # A fit never rises with data, so no gain is below 0: a curve that may as well be flat has a gain of 0 in many resamples.
    if kind.higher_is_better and values[-1] > 100 - 10**-kind.digits / 2:
        sentence = f"more data can't raise {kind.title} on these held-out rows, as it is {values[-1]:.{kind.digits}f} already"
    elif not double["gain_low"] > 10**-kind.digits / 2:
        sentence = f"can't tell whether more data would help: what twice the rows gain in {kind.title} lies in {bounds}, which holds 0"
    elif min(map(len, points.values())) < SEEDS:
        sentence = (f"can't tell whether more data would help: by the curve twice the rows {change}, but fewer than {SEEDS} seeds can't "
                    f"tell that from chance: --seeds {SEEDS} can")
    else:
        sentence = (f"twice the rows ({double['rows']}) would {change}, to about {double['value']:.{kind.digits}f}, if the curve goes on "
                    "as it did")
    return curve | {"fit": dict(zip("abc", map(float, fits[0]), strict=True)), "sentence": sentence}


def still_improving(history: list[dict]) -> bool:
    """Whether the last of several dev evaluations was still clearly better than all before it."""
    # Of two evaluations at one step, the second is that of the best checkpoint, at the end.
    losses = list({entry["step"]: float(entry["eval_loss"]) for entry in reversed(history) if "eval_loss" in entry}.values())[::-1]
    return len(losses) > 1 and losses[-1] < (1 - STILL_IMPROVING) * min(losses[:-1])


# What follows from the numbers


def advice(record: dict) -> list[str]:
    """Sentences: which system to take and how sure that is, the warnings last."""
    done = {system["name"]: system for system in record["systems"] if system["scores"]}
    tuned = {name: system for name, system in done.items() if not system["base"]}
    metric = record["main_metric"]
    if not tuned or record["best"][metric] is None:
        return ["nothing to compare: no training has ended well"] + _failures(record)
    kind, table = item_scores.METRICS[metric], {name: system["scores"][metric] for name, system in done.items()}
    best = record["best"][metric]
    alike = [name for name in tuned if name == best or table[name]["against_best"]["p_holm"] >= ALPHA]
    low, high = (f"{table[best][key]:.{kind.digits}f}" for key in ("low", "high"))
    value = f"{kind.title} {table[best]['mean']:.{kind.digits}f} [{low}, {high}]"
    lines = []
    if len(tuned) == 1:
        lines.append(f"{best} is the only one that was trained: {value}")
    elif alike == [best]:
        others = max(table[name]["against_best"]["p_holm"] for name in tuned if name != best)
        lines.append(f"take {best}: its {value} is better than that of every other (p <= {others:.3f})")
    else:
        cheapest = _cheapest([tuned[name] for name in alike])
        verdict = "no clear winner" if len(alike) == len(tuned) else f"no clear winner among {len(alike)} of {len(tuned)}"
        lines.append(f"{verdict}: {best} has the best {value}, but it can't be told apart from {_and(sorted(set(alike) - {best}))}; "
                     f"the cheapest of them is {cheapest['name']} ({_costs(cheapest['costs'])})")
    base = next((name for name, system in done.items() if system["base"]), None)
    if base and not (table[base]["against_best"] and table[base]["against_best"]["p_holm"] < ALPHA
                     and _better(kind, table[best]["mean"], table[base]["mean"])):
        lines.append(f"warning: {best} can't be told apart from {base}, or is worse: there is no evidence that the training helped")
    if record["items"] < FEW_ITEMS:
        lines.append(f"warning: {record['items']} held-out {record['unit']} are few: intervals of so few are too narrow, and small "
                     "differences can't be seen")
    if record["split"] == "dev":
        lines.append("warning: there are no test rows, so these are the dev rows, by which checkpoints and settings were chosen: the "
                     "scores flatter")
    if len(record["seeds"]) == 1:
        lines.append("warning: one seed, so how much a repetition would differ is unknown: --seeds 3 shows it")
    early = [name for name, system in tuned.items() if any(run["still_improving"] for run in system["runs"])]
    if early:
        lines.append(f"warning: {_and(early)} still improved at the last evaluation: with more training the order may change")
    return lines + _failures(record)


def _failures(record: dict) -> list[str]:
    return [f"warning: {run['name']} failed and is left out: {run['error']}" for system in record["systems"] for run in system["runs"]
            if run["status"] == "failed"]


def _better(kind: item_scores.Metric, a: float, b: float) -> bool:
    return a > b if kind.higher_is_better else a < b


def _cheapest(systems: list[dict]) -> dict:
    """The one that trained fastest; of those within a tenth of it, the smallest on disk."""
    fastest = min(system["costs"]["seconds"] for system in systems)
    return min((system for system in systems if system["costs"]["seconds"] <= 1.1 * fastest), key=lambda system: system["costs"]["disk_mb"])


def _costs(costs: dict) -> str:
    return f"{costs['seconds']:.0f} s of training, {costs['disk_mb']:.1f} MB on disk"


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# The table

COSTS = {"trainable_parameters": ("trained", lambda value: _short(value)), "seconds": ("s", lambda value: f"{value:.0f}"),
         "tokens_per_second": ("tok/s", lambda value: f"{value:.0f}"), "peak_memory_mb": ("GB", lambda value: f"{value / 1000:.1f}"),
         "disk_mb": ("MB", lambda value: f"{value:.1f}"), "latency": ("s/answer", lambda value: f"{value:.3g}")}


def table(record: dict, intervals: int) -> tuple[list[str], list[list[str]]]:
    """The heading and the rows of the comparison, best system first; the first `intervals` metrics show theirs."""
    metrics = [metric for metric in item_scores.OF_TASK[record["task"]] if metric in record["best"]]
    metrics = [record["main_metric"], *(metric for metric in metrics if metric != record["main_metric"])]
    several = len(record["seeds"]) > 1
    heading = ["", *(part for metric in metrics for part in [item_scores.METRICS[metric].title, *(
        [*(["sd"] if several else []), "p"] if metric == record["main_metric"] else [])]), *(title for title, _ in COSTS.values())]
    sign = -1 if item_scores.METRICS[record["main_metric"]].higher_is_better else 1
    rows = []
    for system in sorted(record["systems"], key=lambda system: sign * system["scores"][record["main_metric"]]["mean"]
                         if system["scores"] else math.inf):
        cells = [system["name"]]
        for position, metric in enumerate(metrics):
            if not system["scores"]:
                cells += ["FAILED" if position == 0 else "-", *(["-"] * (1 + several) if position == 0 else [])]
                continue
            own, digits = system["scores"][metric], item_scores.METRICS[metric].digits
            bounds = f" [{own['low']:.{digits}f}, {own['high']:.{digits}f}]" if position < intervals else ""
            cells.append(f"{own['mean']:.{digits}f}{bounds}")
            if position == 0:
                cells += [f"{own['deviation']:.{digits}f}" if own["deviation"] is not None else "-"] if several else []
                cells.append("best" if record["best"][metric] == system["name"] else _p(own["against_best"]))
        costs = system["costs"]
        cells += [show(costs[key]) if costs.get(key) is not None else "-" for key, (_, show) in COSTS.items()]
        rows.append(cells)
    return heading, rows


def screen(record: dict) -> str:
    """The table as text, within about 120 columns."""
    heading, rows = table(record, intervals=1)
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(
        zip(row, widths, strict=True))).rstrip() for row in (heading, *rows))


def markdown(record: dict) -> str:
    """The table with all intervals, what it means, the advice and the curves, as Markdown."""
    heading, rows = table(record, intervals=len(item_scores.METRICS))
    lines = [f"# Comparison on {record['items']} held-out {record['unit']}", "", *(f"- {line}" for line in record["advice"]), "",
             *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (heading, ["---"] * len(heading), *rows)), "",
             *(f"- {line}" for line in notes(record))]
    for system in record["systems"]:
        if system["settings"]:
            lines.append(f"- {system['name']}: {settings(system['settings'])}")
    for entry in record["grid"]:
        lines += ["", f"## Settings of {entry['system']} on dev", "", f"| settings | dev {entry['metric']} |", "|---|---|"]
        lines += [f"| {settings(point['settings'])}{' (chosen)' if point['chosen'] else ''} | "
                  f"{'FAILED' if point['value'] is None else format(float(point['value']), '.4f')} |" for point in entry["points"]]
    for curve in record["learning_curves"]:
        digits = item_scores.METRICS[curve["metric"]].digits
        lines += ["", f"## {curve['system']}: {item_scores.METRICS[curve['metric']].title} over the number of train rows", "",
                  curve["sentence"], "", "| train rows | value | 95 % interval | |", "|---|---|---|---|"]
        lines += [f"| {point['rows']} | {point['value']:.{digits}f} | {point['low']:.{digits}f} to {point['high']:.{digits}f} | "
                  f"{'extrapolated' if 'factor' in point else ''} |" for point in [*curve["points"], *curve["extrapolation"]]]
    return "\n".join([*lines, "", f"Made by `{record['command']}`, {record['finished']}.", ""])


def notes(record: dict) -> list[str]:
    """What the table's figures mean."""
    main = item_scores.METRICS[record["main_metric"]].title
    return [f"intervals: 95 %, bootstrap over {record['items']} {record['unit']}" + (" and over seeds" if len(record["seeds"]) > 1 else ""),
            f"p: that the {main} is as good as the best one's, paired bootstrap, corrected for several comparisons (Holm)",
            "trained: parameters; s, tok/s (tokens a second), GB (peak memory): of the training; MB: to be deployed, without the "
            "model below an adapter; s/answer: one at a time, median", *record["notes"]]


def settings(chosen: dict) -> str:
    """Settings as flags: "rank=16 learning_rate=0.002"."""
    shown = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in chosen.items())
    return " ".join(shown) or "defaults"


def _p(against: dict | None) -> str:
    return "-" if against is None else "<0.001" if against["p_holm"] < 0.001 else f"{against['p_holm']:.3f}"


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
