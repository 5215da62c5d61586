"""report.html: one file with a run's configuration, curves, scores and sample replies. Needs no network to read.

Made from run.json alone, so it can be made again at any time. All text from data or models is escaped by the template.
"""

import io
import math
import re

import jinja2

TEMPLATE = jinja2.Environment(loader=jinja2.PackageLoader("recipes.common", "."), autoescape=True, undefined=jinja2.StrictUndefined)


def render(record: dict) -> str:
    """The report on the run that `record` (run.json) describes, as HTML."""
    return TEMPLATE.get_template("report.html.jinja").render(run=record, curve=curve(record["history"]),
                                                                 ranks=ranks(record.get("method_report", {}).get("rank_pattern", {})))


def rank_grid(pattern: dict[str, int]) -> tuple[list[str], list[int], list[list[float]], dict[str, int]]:
    """The ranks of AdaLoRA's matrices as (names, blocks, a row of ranks for each name, those that are in no block).

    Names have no block number; where a model has two stacks (T5), they begin with the stack's.
    """
    found = {name: re.match(r"(.*?)\.(\d+)\.(.+)$", name) for name in pattern}
    stacks = {parts[1] for parts in found.values() if parts}
    cells = {(parts[3] if len(stacks) == 1 else f"{parts[1].split('.')[0]} {parts[3]}", int(parts[2])): pattern[name]
             for name, parts in found.items() if parts}
    names, blocks = list(dict.fromkeys(name for name, _ in cells)), sorted({block for _, block in cells})
    grid = [[cells.get((name, block), math.nan) for block in blocks] for name in names]
    return names, blocks, grid, {name: pattern[name] for name, parts in found.items() if not parts}


def ranks(pattern: dict[str, int]) -> str:
    """The rank of each matrix that AdaLoRA ended with, block by block, as SVG text; empty if there are none."""
    from matplotlib.figure import Figure

    names, blocks, grid, others = rank_grid(pattern)
    if not grid:
        return ""
    figure = Figure(figsize=(7, 0.9 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(grid, aspect="auto", cmap="viridis"), label="rank")
    axes.set(xlabel="block", yticks=range(len(names)), yticklabels=names, xticks=range(len(blocks)), xticklabels=blocks)
    axes.set_title(", ".join(f"{name}: {rank}" for name, rank in others.items()), fontsize="small")
    return _svg(figure)


def curve(history: list[dict]) -> str:
    """Train and dev loss over steps, as SVG text; empty if nothing was logged."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "train"), ("eval_loss", "dev")):
        points = [(entry["step"], float(entry[key])) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    if not axes.lines:
        return ""
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _svg(figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    return out.getvalue()[out.getvalue().index("<svg"):]
