"""The pictures of the reports, as SVG text: no network, no window, text that stays text and takes the colours and fonts of the page."""

import io
import math
import re
import warnings

import matplotlib
from matplotlib.figure import Figure  # not pyplot: no global state
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

COLOURS = ("#2f7fc1", "#e07b39", "#2f9d6e", "#b55fa5", "#b8901f", "#6f7f8f", "#c94f4f", "#4f6fc9")  # told apart on white and on black


matplotlib.rcParams["text.parse_math"] = False  # a label such as $x$ is text, and no formula


def svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element that a screen reader calls `label`. Black becomes the page's text colour."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}), warnings.catch_warnings():
        # Widths are taken from a font that lacks Chinese; what is drawn is drawn by the reader's own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, format="svg", transparent=True)
    text = out.getvalue()[out.getvalue().index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("#000000", "currentColor")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    label = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" fill="currentColor"', 1)


def _axes(width: float = 4.6, height: float = 2.6):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.locator_params(axis="x", nbins=5)  # long numbers, such as 5.9975, run into each other where there are more
    return figure, axes


def finite(value) -> bool:
    """Whether this entry of a record is a number that can be drawn; run.json has "nan" and "inf" as text."""
    try:
        return value is not None and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def lines(series: dict[str, list[tuple[float, float]]], label: str, xlabel: str, ylabel: str = "") -> str:
    """Curves of (x, y) points by name; "" if there is nothing to draw."""
    series = {name: [(x, float(y)) for x, y in points if finite(y)] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    figure, axes = _axes()
    for i, (name, points) in enumerate(series.items()):
        colour, style = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
        marker = "o" if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=3, linewidth=1.5, label=short(name))
    axes.locator_params(axis="x", integer=True)  # there is no step 2.5
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return svg(figure, label)


def intervals(rows: list[tuple[str, float, float, float]], label: str) -> str:
    """(name, value, low, high), a dot with a whisker each, from top to bottom; "" if there is nothing to draw."""
    rows = [row for row in rows if finite(row[1])]
    if not rows:
        return ""
    figure, axes = _axes(4.6, 0.7 + 0.3 * len(rows))
    for i, (_, value, low, high) in enumerate(rows):
        value, colour = float(value), COLOURS[i % len(COLOURS)]
        if finite(low) and finite(high):
            axes.plot([float(low), float(high)], [i, i], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot([value], [i], color=colour, marker="o", markersize=6)
    axes.set(yticks=range(len(rows)), yticklabels=[short(name) for name, *_ in rows], ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", color="#8888", linewidth=0.5)
    return svg(figure, label)


def scatter(points: list[tuple[str, float, float, float, float]], label: str, xlabel: str, ylabel: str) -> str:
    """(name, x, y, low, high), named in the picture; x on a logarithmic scale if it spans more than a factor of ten.

    A system without this cost (the untuned model was not trained) is not drawn. "" without points.
    """
    points = [(name, float(x), float(y), low, high) for name, x, y, low, high in points
              if finite(x) and finite(y) and float(x) > 0]
    if not points:
        return ""
    figure, axes = _axes(4.6, 3.2)
    for i, (name, x, y, low, high) in enumerate(points):
        colour = COLOURS[i % len(COLOURS)]
        if finite(low) and finite(high):
            axes.plot([x, x], [float(low), float(high)], color=colour, linewidth=1.5)
        axes.plot([x], [y], color=colour, marker="o", markersize=6, linestyle="", label=short(name))
    xs = [x for _, x, *_ in points]
    if max(xs) > 10 * min(xs):
        axes.set_xscale("log")
        few = max(xs) < 100 * min(xs)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if few else (1,)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 3k, 1M: 3 x 10^3 and 4 x 10^3 run into each other
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.margins(0.12)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return svg(figure, label)


def learning_curve(points: list[dict], extrapolation: list[dict], label: str, xlabel: str, ylabel: str) -> str:
    """A score over the number of train rows with its interval; dashed, what the fitted curve says of more rows."""
    figure, axes = _axes(4.6, 3.0)
    for part, style in ((points, "-"), ([*points[-1:], *extrapolation], "--")):
        drawn = [p for p in part if finite(p["value"])]
        axes.plot([p["rows"] for p in drawn], [float(p["value"]) for p in drawn], style, color=COLOURS[0], marker="o", markersize=4)
        bounded = [p for p in drawn if finite(p["low"]) and finite(p["high"])]
        axes.fill_between([p["rows"] for p in bounded], [float(p["low"]) for p in bounded], [float(p["high"]) for p in bounded],
                          color=COLOURS[0], alpha=0.2 if style == "-" else 0.1, linewidth=0)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    return svg(figure, label)


def matrix(counts: list[list[int]], labels: list[str], label: str, xlabel: str, ylabel: str) -> str:
    """Counts as a table of shades, each with its number; a row's shade is its share of the row."""
    figure = Figure(figsize=(2.2 + 0.45 * len(labels), 1.8 + 0.4 * len(labels)), layout="constrained")
    axes = figure.subplots()
    axes.pcolormesh([[n / max(sum(row), 1) for n in row] for row in counts], cmap="Blues", vmin=0, vmax=1)  # imshow would embed a bitmap
    axes.invert_yaxis()
    for i, row in enumerate(counts):
        for j, n in enumerate(row):
            if n:
                ink = "white" if n > 0.55 * sum(row) else "#222222"
                axes.text(j + 0.5, i + 0.5, str(n), ha="center", va="center", fontsize=8, color=ink)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    middles = [i + 0.5 for i in range(len(labels))]
    axes.set_xticks(middles, [short(label) for label in labels], rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(middles, [short(label) for label in labels], fontsize=8)
    return svg(figure, label)


def model_name(model: dict) -> str:
    """What to call the model of a run.json; one from scratch by what gave it its architecture or its tokenizer."""
    return f"{short(model['requested'])} from scratch" if model.get("from_scratch") else short(model["used"] or model["requested"])


def short(name: str) -> str:
    """A model's name as it fits beside a picture: of a path, the last part. What tells two apart, as " (untuned)", is kept."""
    path, blank, rest = name.partition(" (")
    path, rest = path.rstrip("/").rpartition("/")[2], (blank + rest)[:24]
    return path + rest if len(path + rest) <= 28 else path[: 27 - len(rest)] + "…" + rest
