"""report.html: one file with a run's configuration, curves, scores and sample replies. Needs no network to read.

Made from run.json alone, so it can be made again at any time. All text from data or models is escaped by the template.
"""

import io

import jinja2

TEMPLATE = jinja2.Environment(loader=jinja2.PackageLoader("recipes.common", "."), autoescape=True, undefined=jinja2.StrictUndefined)


def render(record: dict) -> str:
    """The report on the run that `record` (run.json) describes, as HTML."""
    return TEMPLATE.get_template("report.html.jinja").render(run=record, curve=curve(record["history"]))


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
    out = io.StringIO()
    figure.savefig(out, format="svg")
    return out.getvalue()[out.getvalue().index("<svg"):]
