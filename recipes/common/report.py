"""report.html: one file with a run's or a comparison's data, configuration, curves, scores and answers. Needs no network to read.

Made from run.json or compare.json alone, so it can be made again at any time. All text from data or models is escaped by the templates.
"""

import difflib
import math
import re

import jinja2

from recipes.common import args, plots
from recipes.common.wording import name_in, sentence_in, wording

TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("recipes.common", "."), autoescape=True, undefined=jinja2.StrictUndefined,
                               trim_blocks=True, lstrip_blocks=True)
REFERENCES = ("reference", "label", "right")  # who speaks the right answer in a sample
SPEED = ("_runtime", "_per_second")
_CJK = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_TOKEN = re.compile(f"[{_CJK}]|(?:(?![{_CJK}])\\w)+|\\s+|.", re.S)  # a Chinese character, a word, blanks, any other sign


def render(record: dict, language: str = "en") -> str:
    """The report on the run that `record` (run.json) describes, as HTML, in "en" or "zh"."""
    t = wording(language)
    evaluations = {split: result | {"pictures": _score_pictures(result), "matrix": _matrix(result, t),
                                    "answers": [_answers(sample) for sample in result["samples"]]}
                   for split, result in record.get("evaluation", {}).items()}
    flags = {"shared_arguments": _read_by(record["task"], record["shared_arguments"])}
    return _page("report.html.jinja", language, run=record | flags, evaluations=evaluations,
                 curves=curves(record["history"], language, "flops" in record),
                 ranks=ranks(record.get("method_report", {}).get("rank_pattern", {})),
                 title=t("{recipe} on {model}", recipe=record["recipe"], model=plots.model_name(record["model"])))


def render_comparison(record: dict, language: str = "en") -> str:
    """The report on the comparison that `record` (compare.json, see scripts/compare.py) describes, as HTML, in "en" or "zh"."""
    t = wording(language)
    scored = [system for system in record["systems"] if system["scores"]]
    pictures = {metric: plots.intervals([(s["name"], *(s["scores"][metric][key] for key in ("mean", "low", "high"))) for s in scored
                                         if metric in s["scores"]], kind["title"]) for metric, kind in record["metrics"].items()}
    flags = {"configuration": _read_by(record["task"], record.get("configuration", {}))}
    return _page("comparison.html.jinja", language, run={"doctor": None} | record | flags, scored=scored, pictures=pictures,
                 costs=_cost_pictures(record, scored, language), training=_training_pictures(record, language),
                 curves=[curve | {"picture": _learning_curve(curve, record, language)} for curve in record["learning_curves"]],
                 answers=[_answers([*map(tuple, sample["context"][-1:]), ("reference", _text(sample["reference"])),
                                    *((name, _text(answer)) for name, answer in sample["answers"].items())])
                          | {"earlier": sample["context"][:-1]} for sample in record["samples"]],
                 title=t("Comparison of {systems} on {model}", systems=", ".join(s["name"] for s in record["systems"] if not s["base"]),
                         model=plots.model_name(record["model"])))


def _read_by(task: str, flags: dict) -> dict:
    others = args.of_other_tasks(task)
    return {name: value for name, value in flags.items() if name not in others}


def _page(template: str, language: str, **values) -> str:
    return TEMPLATES.get_template(template).render(
        t=wording(language), name=name_in(language), told=sentence_in(language), language=language, number=number, short=plots.short,
        language_of=language_of, **values)


def number(value, digits: int = 2) -> str:
    """A number of a record as text; "-" for none, "nan" and "inf" as they are."""
    if value is None or isinstance(value, float) and math.isnan(value) or value == "nan":
        return "-"
    return f"{float(value):,.{digits}f}"


def language_of(text: str) -> str:
    """What the browser is told of a text, for its choice of font: "zh" if there is a Chinese character in it."""
    return "zh" if re.search(f"[{_CJK}]", text) else "en"


# Answers


def differences(reference: str, answer: str) -> list[tuple[str, bool]]:
    """`answer` in pieces, each with whether it also stands in `reference`, in this order: by word, in Chinese by character."""
    ours, theirs = _TOKEN.findall(answer), _TOKEN.findall(reference)
    same = [False] * len(ours)
    for block in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_matching_blocks():
        same[block.b: block.b + block.size] = [True] * block.size
    pieces = []
    for token, own in zip(ours, same, strict=True):
        own = pieces[-1][1] if token.isspace() and pieces else own  # blanks go with the word before them
        if pieces and pieces[-1][1] == own:
            pieces[-1] = (pieces[-1][0] + token, own)
        else:
            pieces.append((token, own))
    return pieces


def _answers(sample: list[tuple[str, str]]) -> dict:
    """A sample (who, text) as what was asked, after nothing earlier, the reference, and each model's answer in pieces."""
    at = next(i for i, (who, _) in enumerate(sample) if who in REFERENCES)
    who, reference = sample[at]
    return {"earlier": [], "asked": sample[:at], "who": who, "reference": reference,
            "answers": [(model, differences(reference, text)) for model, text in sample[at + 1:]]}


def _text(value) -> str:
    return value if isinstance(value, str) else " / ".join(map(str, value))  # several references, or labels


# Pictures


def curves(history: list[dict], language: str, per_token: bool = False) -> list[tuple[str, str]]:
    """(title, SVG) of the losses, the learning rate, the gradient norm and the other dev scores over the steps; only those logged.

    With `per_token`, the losses over the tokens seen as well.
    """
    t, name = wording(language), name_in(language)

    def points(key):
        return [(entry["step"], entry[key]) for entry in history if key in entry]

    found = [(t("loss (nats per item)"), {t("train"): points("loss"), t("dev"): points("eval_loss")}),
             (t("learning rate"), {"": points("learning_rate")}), (t("gradient norm"), {"": points("grad_norm")})]
    others = _other_scores(history)
    found += [(f"{t('dev')}: {name(key.removeprefix('eval_'))}", {"": points(key)}) for key in others]
    pictures = [(title, plots.lines(series, title, t("step"))) for title, series in found]
    if per_token:
        over = {t(split): [(entry["num_input_tokens_seen"], entry[key]) for entry in history if key in entry]
                for split, key in (("train", "loss"), ("dev", "eval_loss"))}
        title = t("loss over tokens")
        pictures.insert(1, (title, plots.lines(over, title, t("tokens"))))
    return [(title, picture) for title, picture in pictures if picture]


def _other_scores(history: list[dict]) -> list[str]:
    """The keys of the dev scores in a history, beside the loss and the perplexity that follows from it."""
    return list(dict.fromkeys(key for entry in history for key in entry
                              if key.startswith("eval_") and not key.endswith(SPEED) and key not in ("eval_loss", "eval_perplexity")))


def _training_pictures(record: dict, language: str) -> list[tuple[str, str]]:
    """(title, SVG) of what was logged in training over the steps, a line for each system: its first run that ended well."""
    t, name = wording(language), name_in(language)
    histories = {system["name"]: next((run["history"] for run in system["runs"] if run.get("history")), []) for system in record["systems"]}
    titles = {"eval_loss": t("dev loss"), "loss": t("train loss"), "learning_rate": t("learning rate"), "grad_norm": t("gradient norm")}
    titles |= {key: f"{t('dev')}: {name(key.removeprefix('eval_'))}" for history in histories.values() for key in _other_scores(history)}
    pictures = [(title, plots.lines({system: [(entry["step"], entry[key]) for entry in history if key in entry]
                                     for system, history in histories.items()}, title, t("step"))) for key, title in titles.items()]
    return [(title, picture) for title, picture in pictures if picture]


def _score_pictures(result: dict) -> list[tuple[str, str]]:
    """(heading, SVG) of each score that has an interval, a line for each model."""
    found = result.get("intervals", {})
    headings = dict.fromkeys(heading for scores in found.values() for heading in scores)
    pictures = [(heading, plots.intervals([(model, *(scores[heading][key] for key in ("value", "low", "high")))
                                           for model, scores in found.items() if heading in scores], heading)) for heading in headings]
    return [(heading, picture) for heading, picture in pictures if picture]


def _matrix(result: dict, t) -> str:
    if "confusion_matrix" not in result:
        return ""
    labels, title = result["confusion_matrix"]["labels"], t("Which labels are mistaken for which")
    return plots.matrix(result["confusion_matrix"]["matrix"], labels, title, t("predicted label"), t("right label"))


def _cost_pictures(record: dict, scored: list[dict], language: str) -> list[str]:
    """The main score over each cost, a point for each system that has both."""
    main, t = record["main_metric"], wording(language)
    if main not in record["metrics"]:  # no run ended well
        return []
    pictures, score = [], name_in(language)(record["metrics"][main]["title"])
    for key, title in (("trainable_parameters", t("trained parameters")), ("seconds", t("seconds of training")),
                       ("peak_memory_mb", t("peak memory (MB)")), ("disk_mb", t("MB on disk")), ("latency", t("seconds for an answer"))):
        points = [(s["name"], s["costs"].get(key), *(s["scores"][main][part] for part in ("mean", "low", "high"))) for s in scored
                  if main in s["scores"]]
        pictures.append(plots.scatter(points, f"{score}, {title}", title, score))
    return [picture for picture in pictures if picture]


def _learning_curve(curve: dict, record: dict, language: str) -> str:
    title, t = name_in(language)(record["metrics"][curve["metric"]]["title"]), wording(language)
    return plots.learning_curve(curve["points"], curve["extrapolation"], f"{curve['system']}: {title}", t("train rows"), title)


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
    names, blocks, grid, others = rank_grid(pattern)
    if not grid:
        return ""
    figure = plots.Figure(figsize=(7, 0.9 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(grid, aspect="auto", cmap="viridis"), label="rank")
    axes.set(xlabel="block", yticks=range(len(names)), yticklabels=names, xticks=range(len(blocks)), xticklabels=blocks)
    axes.set_title(", ".join(f"{name}: {rank}" for name, rank in others.items()), fontsize="small")
    return plots.svg(figure, "ranks")
