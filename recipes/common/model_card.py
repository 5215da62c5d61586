"""MODEL_CARD.md: the facts of run.json as a model card of the Hugging Face Hub (https://huggingface.co/docs/hub/model-cards).

It is README.md in a Hub repository; here it has another name, as PEFT writes a README.md of its own with every adapter.
"""

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from recipes.common import evaluation
from recipes.common.plots import finite, model_name, short

TEMPLATE = jinja2.Environment(loader=jinja2.PackageLoader("recipes.common", "."), undefined=jinja2.StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True, autoescape=False)  # Markdown, not HTML
PIPELINES = {"chat": "text-generation", "classify": "text-classification", "tag": "token-classification", "translate": "translation",
             "pretrain": "text-generation"}


def render(record: dict, library: str) -> str:
    """The card of the run that `record` (run.json) describes, as Markdown with YAML in front; `library` is "peft" or "transformers".

    It names no licence: that of the base model and of the data decide, which are the user's to know.
    """
    evaluations = record.get("evaluation", {})
    results = _results(record)
    base, name = record["model"]["used"], model_name(record["model"])
    data = ModelCardData(
        base_model=None if _is_path(base) else base, library_name=library, pipeline_tag=_pipeline(record),
        language=sorted({row["language"] for result in evaluations.values() for row in result["table"]} - {"all"}) or None,
        datasets=_datasets(record), metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        tags=["dialogue-recipes", record["recipe"]], model_name=f"{record['recipe']}-{name}", eval_results=results or None)
    return TEMPLATE.get_template("model_card.md.jinja").render(yaml=data.to_yaml(), run=record, evaluations=evaluations, base=name,
                                                                library=library, cell=cell, short=short)


def cell(value) -> str:
    """A value as it fits into a cell of a table."""
    text = f"{float(value):.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _pipeline(record: dict) -> str:
    """What the Hub calls the task; an encoder, which counts the words that it is asked for, does not write text."""
    masked = record["task"] == "pretrain" and record["data"]["splits"]["dev"]["items"] == "words"
    return "fill-mask" if masked else PIPELINES[record["task"]]


def _results(record: dict) -> list[EvalResult]:
    """Each score of this model over all languages; before any evaluation, those of the dev rows."""
    kind, [name, *_] = _pipeline(record), _datasets(record)
    scores = [("dev", key.removeprefix("dev_"), value) for key, value in record["metrics"].items()]
    if record.get("evaluation"):
        scores = [(split, heading, value) for split, result in record["evaluation"].items() for row in result["table"]
                  if (row["language"], row["model"]) == ("all", evaluation.own_name(record))
                  for heading, value in zip(result["columns"], row["values"], strict=True)]
    return [EvalResult(task_type=kind, dataset_type=name, dataset_name=name, dataset_split=split, metric_name=heading,
                       metric_type=heading.lower().replace(" ", "_"), metric_value=round(float(value), 4))
            for split, heading, value in scores if finite(value)]


def _datasets(record: dict) -> list[str]:
    """The names of the sources: of a path the last part, without the weight of a mixture."""
    given = record["shared_arguments"]["data"]
    names = [source.partition(":")[0] for source in ([given] if isinstance(given, str) else given)]
    return [name if name.count("/") == 1 and not name.startswith(("data/", ".", "/")) else short(name) for name in names]


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1
