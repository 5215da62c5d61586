"""What a comparison has found, in one record: compare.json, whose fields scripts/compare.py describes.

`plan` is what scripts/compare.py made of its flags (`check`), `results` the result of each run (comparison_runs.py), `out` its folder.
"""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

from recipes.common import args, comparison, data, evaluation, item_scores, runs, statistics
from recipes.common.comparison_runs import Run, judged_by_loss
from recipes.common.errors import UserError

RESAMPLES = 2000
# Settings of the Trainer that decide how a recipe learns; the report shows them with the recipe's own flags.
HOW = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps",
       "weight_decay")


def collect(plan, chosen: dict[str, tuple], grid: list[dict], results: dict[Run, dict], base_with: Run | None, out: Path) -> dict:
    """The record. `chosen` holds the settings of each recipe, `grid` what was tried to choose them, `base_with` is the run with which the
    untuned model was scored. Raises `UserError` where the runs saw other rows."""
    texts = {run: answers(out / run.name, plan.split) for run, result in results.items() if result["status"] == "done"}
    refuse_other_rows(texts, results, out)
    base, base_with, model = untuned(plan, texts, results, base_with)
    counts = {run: counts_of(plan, text, evaluation.own_name(results[run]["record"])) for run, text in texts.items()}
    own = {name: [run for run in results if run.system == name and run.fraction == 1] for name in chosen}
    scored = {name: [run for run in wanted if run in texts] for name, wanted in own.items()}
    systems = {name: [counts[run] for run in members] for name, members in scored.items() if members}
    if base:
        systems[base] = [counts_of(plan, texts[base_with], model)]
    items = len(next(iter(counts.values()))[plan.metric]) if counts else 0
    drawn = statistics.draws(items, RESAMPLES, 0) if items else None
    found = comparison.score(systems, base, drawn) if any(name != base for name in systems) else {}
    # What all runs have in common is told from one that saw all rows, if any did.
    first = next((results[run]["record"] for run in sorted(texts, key=lambda run: -run.fraction)), None)
    record = {
        "command": runs.command(), "finished": datetime.now(UTC).isoformat(timespec="seconds"), "task": plan.shared.task,
        "model": first["model"] if first else {"requested": plan.shared.model, "used": None},
        "data": first["data"]["splits"] if first else {}, "doctor": first["data"].get("doctor") if first else None,
        "configuration": first["shared_arguments"] if first else {}, "split": plan.split,
        "source": first["evaluation"][plan.split]["source"] if first else None,
        "items": items, "unit": item_scores.UNITS.get(plan.shared.task, plan.kind.UNIT), "seeds": plan.seeds,
        "budget": plan.options.budget, "flags": plan.common,
        "main_metric": plan.metric,
        "metrics": {name: {key: getattr(item_scores.METRICS[name], key) for key in ("title", "unit", "higher_is_better", "digits")}
                    for name in found},
        "best": {metric: table["best"] for metric, table in found.items()},
        "systems": [system(plan, name, chosen[name], wanted, scored[name], results, found, out) for name, wanted in own.items()],
        "grid": grid, "learning_curves": curves(plan, own, results, counts, drawn), "samples": [], "notes": [],
        "hardware": first["hardware"] if first else None, "versions": first["versions"] if first else None,
    }
    if found:
        if base:
            record["systems"].append(base_system(plan, base, model, results[base_with]["record"], found))
        # system -> a run that was scored with it, and the name of its answers there
        members = {name: (runs_of[0], evaluation.own_name(results[runs_of[0]]["record"])) for name, runs_of in scored.items() if runs_of}
        record["samples"] = samples(plan, members | ({base: (base_with, model)} if base else {}), texts)
        for name, runs_of in scored.items():
            for run in runs_of:
                record["notes"] += cut_short(plan, results[run]["record"], evaluation.own_name(results[run]["record"]),
                                             run.name if len(runs_of) > 1 else name)
        if base:
            record["notes"] += cut_short(plan, results[base_with]["record"], model, base)
        record["notes"] += notes(plan, grid, results, record["learning_curves"])
    record["advice"] = comparison.advice(record) + [f"{curve['system']}: {curve['sentence']}" for curve in record["learning_curves"]]
    return record


def untuned(plan, texts: dict, results: dict, base_with: Run | None) -> tuple[str | None, Run | None, str | None]:
    """(name of the system that was not tuned, the run that was scored with it, the name of its answers there), None each if there is none.

    Of single labels it is a guess by their frequency, whose answers are added to `texts`.
    """
    if base_with:
        return "untuned", base_with, evaluation.base_name(results[base_with]["record"])
    if not texts or plan.shared.task != "classify" or plan.shared.multi_label:
        return None, None, None
    run, name = next(iter(texts)), "label frequencies"
    add_frequencies(*texts[run], results[run]["record"]["data"]["labels"], name)
    return name, run, name


def system(plan, name: str, settings: tuple, wanted: list[Run], scored: list[Run], results: dict, found: dict, out: Path) -> dict:
    """A recipe in the record, of whose `wanted` runs the `scored` ones ended well."""
    return {"name": name, "recipe": str(plan.paths[name]), "base": False, "settings": dict(settings),
            "configuration": configuration([results[run]["record"] for run in scored[:1]]),
            "status": "done" if len(scored) == len(wanted) else "partly" if scored else "failed",
            "runs": [described(run, results[run], out) for run in wanted],
            "scores": {metric: table["systems"][name] for metric, table in found.items()} if scored else None,
            "costs": costs([(results[run]["record"], out / run.name) for run in scored], plan)}


def base_system(plan, name: str, model: str, scored_with: dict, found: dict) -> dict:
    """The untuned system in the record; `scored_with` is the run.json that holds the latency of `model`."""
    latency = scored_with["evaluation"][plan.split]["latency"].get(model)
    return {"name": name, "recipe": None, "base": True, "settings": {}, "configuration": {}, "status": "done", "runs": [],
            "scores": {metric: table["systems"][name] for metric, table in found.items()},
            "costs": {"trainable_parameters": 0, "disk_mb": 0.0, "latency": latency and float(latency)}}


def notes(plan, grid: list[dict], results: dict, learning_curves: list[dict]) -> list[str]:
    """What has to be known of the budget, of the choice of settings and of the learning curves."""
    said = []
    if plan.options.budget and plan.options.budget.startswith("minutes") and "constant_with_warmup" in plan.common:
        said.append("minutes: the learning rate is constant after the warm-up, as a schedule would be cut")
    if grid and plan.dev_metric != plan.metric:
        said.append(judged_by_loss(plan.metric))
    said += [f"{entry['system']}: no settings could be chosen, as all that were tried failed: it has its defaults"
             for entry in grid if not any(point["chosen"] for point in entry["points"])]
    said += [f"{run.name} failed, so this point is missing: {result['error']}" for run, result in results.items()
             if run.fraction < 1 and result["status"] == "failed"]
    if plan.fractions != [1]:
        said.append("shares of the data have the same budget as all of it: a small share is read more often")
    if any(len(curve["points"]) == 3 for curve in learning_curves):
        said.append("three amounts of data fit any such curve: a fourth would test it")
    return said


def answers(folder: Path, split: str) -> tuple[list[dict], dict]:
    """The lines of predictions-SPLIT.jsonl and the losses of losses-SPLIT.json of a scored run."""
    lines = evaluation.predictions((folder / f"predictions-{split}.jsonl").read_text(encoding="utf-8"))
    return lines, json.loads((folder / f"losses-{split}.json").read_text(encoding="utf-8"))


def add_frequencies(lines: list[dict], losses: dict, labels: dict[str, int], name: str) -> None:
    """Add the answers of a model that knows nothing but how often each label is among the train rows: it always says the most frequent.
    A row without a label, or with one that no train row has (--start_from knows more), has no loss."""
    total, frequent = sum(labels.values()), max(labels, key=labels.get)
    losses[name] = {}
    for line in lines:
        line[name] = frequent
        count = labels.get(line["label"])
        losses[name][line["row"]] = [-math.log(count / total), 1] if count else [0.0, 0]


def refuse_other_rows(texts: dict, results: dict, out: Path) -> None:
    """Raise `UserError` unless all runs were trained and scored on the same rows."""
    def rows(run):
        lines, losses = texts[run]
        splits = results[run]["record"]["data"]["splits"]
        asked = [{name: value for name, value in line.items() if name in evaluation.COLUMNS} for line in lines]
        items = [{row: n for row, (_, n) in each.items()} for each in list(losses.values())[-1:]]
        return [splits[split]["sha256"] for split in ("train", "dev")], asked, items

    if other := [run for run in texts if rows(run) != rows(next(iter(texts)))]:
        raise UserError(f"{out / other[0].name} and {out / next(iter(texts)).name} saw other rows, as the data has changed between them: "
                        "compare anew in another --output_dir")


def counts_of(plan, text: tuple[list[dict], dict], model: str) -> dict:
    """The counts of each item for this model (item_scores.counts)."""
    lines, losses = text
    counts = item_scores.counts(plan.shared.task, lines, losses[model], model)
    if plan.shared.multi_label:
        del counts["f1_macro"]  # it would be that of the combinations
    return counts


def described(run: Run, result: dict, out: Path) -> dict:
    """A run in the record."""
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
    """What the runs of a system cost, the mean over its seeds; of latency the median, of memory the largest."""
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


def samples(plan, members: dict[str, tuple[Run, str]], texts: dict) -> list[dict]:
    """Held-out items, evenly from the first to the last, with the answer of every system: of (run, name of its answers) in `members`."""
    by = {name: (texts[run][0], model) for name, (run, model) in members.items()}
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
    shared, kind = plan.shared, plan.kind
    found = data.load_split(shared.data, plan.split, kind.check(shared), shared.dev_fraction, plan.seeds[0], shared.on_bad_row,
                            shared.columns, shared.split)
    return kind.rows(found.rows, shared)
