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


def ranks(pattern: dict[str, int]) -> str:
    """The rank of each matrix that AdaLoRA ended with, block by block, as SVG text; empty if there are none."""
    from matplotlib.figure import Figure

    places = {name: re.search(r"\.(\d+)\.(.+)$", name) for name in pattern}
    if not pattern or not all(places.values()):
        return ""
    blocks = sorted({int(found[1]) for found in places.values()})
    matrices = list(dict.fromkeys(found[2] for found in places.values()))
    grid = [[math.nan] * len(blocks) for _ in matrices]
    for name, found in places.items():
        grid[matrices.index(found[2])][blocks.index(int(found[1]))] = pattern[name]
    figure = Figure(figsize=(7, 0.8 + 0.3 * len(matrices)), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(grid, aspect="auto", cmap="viridis"), label="rank")
    axes.set(xlabel="block", yticks=range(len(matrices)), yticklabels=matrices)
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
