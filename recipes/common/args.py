"""The flags that all recipes share, and `parse`, which reads a recipe's command line.

A recipe's own flags are the fields of its `MethodArguments`. Everything else is `transformers.TrainingArguments`, whose flags
all work under their own names. `transformers` is imported only once the command line is known to ask for a run, so that
`--help` and a mistyped flag answer at once.
"""

import argparse
import difflib
import math
import os
import sys
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from recipes.common import errors
from recipes.common.errors import UserError


def option(default, help, **metadata):
    """A dataclass field with its help text: one flag of a recipe. `at_least` and `below` bound a number."""
    return field(default=default, metadata={"help": help, **metadata})


def trainer_option(default, help, **others):
    """A flag of `TrainingArguments` for which the recipe has a better default.

    `others` are defaults for a task (`classify=1e-3`), or for a flag of the recipe that is switched on (`prefix_projection=1e-3`).
    """
    shown = "".join(f"; {value:g} with {name}" for name, value in others.items())
    return option(default, help + shown, trainer=True, at_least=0, others=others)


@dataclass
class SharedArguments:
    """What every recipe needs to know besides `TrainingArguments`."""

    model: str = option("smollm2", "Hub id (gpt2, Qwen/Qwen3-0.6B), a folder, or a bundled name: smollm2, minilm, gemma3")
    data: list[str] = option(("data/customer_service",), "files, folders with train/dev/test files, or Hub ids, in any format of "
                             "data/README.md; NAME:WEIGHT each: their shares of the train rows, as in a.jsonl:0.7 b.csv:0.3")
    columns: str = option(None, "rename columns, NEW=OLD: source=question,target=answer")
    task: typing.Literal["chat", "classify", "tag", "translate"] = option("chat", "what the rows are: data/README.md holds each task's "
                                                                          "columns")
    fallback_model: str = option(None, "use this model, with a banner that says so, when the Hub can't be reached")
    max_length: int = option(None, "tokens a row may have (default: the task's, 768 for chat); a longer dialogue loses whole turns, the "
                             "oldest first", at_least=8)
    dev_fraction: float = option(0.1, "share of the train dialogues held out as dev where the data has no dev file")
    on_bad_row: typing.Literal["stop", "skip"] = option("stop", "a row that breaks the contract: stop, or leave out and list")
    max_train_samples: int = option(None, "train on the first N rows only (for a quick trial)", at_least=1)
    max_eval_samples: int = option(None, "evaluate on the first N dev rows only", at_least=1)
    streaming: bool = option(False, "read the train rows while training, from sources of any size, and keep nothing; needs --max_steps")
    shuffle_buffer: int = option(10_000, "of --streaming: rows among which the next one is drawn", at_least=1)
    preprocessing_num_workers: int = option(None, "processes that tokenize (default: one a CPU core)", at_least=1)
    early_stopping_patience: int = option(0, "stop after N evaluations without a better dev loss; 0: never", at_least=0)

    label: str = option("label", "the column to predict; of dialogues, the key of the turns (intent, sentiment)", task="classify")
    context_turns: int = option(0, "of dialogues: the N turns before the one to classify are read too", task="classify", at_least=0)
    multi_label: bool = option(False, "a row has a list of labels, each a yes or no of its own", task="classify")
    class_weights: typing.Literal["none", "balanced"] = option("none", "balanced: rare labels count more, all labels alike in sum",
                                                               task="classify")
    pooling: typing.Literal["auto", "mean", "cls"] = option("auto", "what an encoder's head sees: the mean of all tokens, or the first; "
                                                            "auto: as the checkpoint was trained", task="classify")
    head_start: typing.Literal["prototypes", "random"] = option("prototypes", "a new head's weights: each class's mean state, or drawn at "
                                                                "random, as with --multi_label", task="classify")
    oos_label: str = option(None, "label of the rows that belong to no class (out of scope): never trained on; dev rows of it set the "
                            "confidence below which a row is turned away", task="classify")

    start_from: str = option(None, "go on from this finished run on new data, with its model, template and labels; an adapter by its own "
                             "recipe", group="continual fine-tuning")
    replay: str = option(None, "SOURCE:SHARE mixes old or general rows in: SHARE of the train rows come from there, as in old.jsonl:0.2",
                         group="continual fine-tuning")
    measure_forgetting: str = option(None, "score this data's dev rows before and after the training; --replay does so by itself",
                                     group="continual fine-tuning")

    layer_lr_decay: float = option(1.0, "each block learns this times as fast as the one above it: 0.9 spares the lower ones",
                                   at_least=0.01, group="against over-fitting")
    model_dropout: float = option(None, "the model's own dropout, wherever it has one (default: as the checkpoint says)", at_least=0,
                                  below=1, group="against over-fitting")
    adversarial: typing.Literal["none", "fgm", "pgd"] = option("none", "train on disturbed embeddings too: fgm doubles the time of a step, "
                                                               "pgd takes four times as long", group="against over-fitting")
    adversarial_epsilon: float = option(0.05, "size of the disturbance, as a share of the embeddings' own length", at_least=0,
                                        group="against over-fitting")
    r_drop: float = option(0.0, "weight of R-Drop: two passes with different dropout must agree (1 to 5); doubles the time of a step",
                           at_least=0, group="against over-fitting")
    instruction: str = option(None, "what a decoder-only model is told before the source (Translate to Chinese:)", task="translate")
    source_prefix: str = option(None, "what an encoder-decoder reads before the source (T5: translate English to German: )",
                                task="translate")


@dataclass
class Method:
    """Base of every recipe's `MethodArguments`."""

    load_in_4bit = False  # a method that freezes the matrices may have a flag of this name

    def check(self, shared: SharedArguments, training) -> None:
        """Raise `UserError` for a combination of flags that this method can't do."""

    def refuses(self, task: str, kind: str) -> str | None:
        """Why this method can't learn the task with models of this kind (models.KINDS), or None if it can."""


# Where these differ from TrainingArguments' own defaults, it is for runs of minutes to hours on some hundreds to some
# ten thousands of dialogues: evaluate and save each epoch, keep the best, show curves.
TRAINER_DEFAULTS = {
    "num_train_epochs": (2.0, "passes over the train rows"),
    "warmup_steps": (0.1, "below 1: share of all steps; the learning rate climbs to its peak meanwhile"),
    "lr_scheduler_type": ("cosine", "shape of the learning rate after the warm-up"),
    "logging_steps": (5.0, "steps between two lines of the log"),
    "eval_strategy": ("epoch", "when to score the dev rows"),
    "save_strategy": ("epoch", "when to write a checkpoint"),
    "save_total_limit": (2, "checkpoints kept: the best and the last"),
    "load_best_model_at_end": (True, "end with the checkpoint that scored best on dev"),
    "metric_for_best_model": ("loss", "what 'best' means"),
    "greater_is_better": (False, "lower is better for a loss"),
    "include_num_input_tokens_seen": ("non_padding", "count the tokens trained on, for tokens per second"),
    "report_to": ("tensorboard", "event files in the run folder; 'none' for none"),
}

SHORT = ("classify", "tag", "translate")  # tasks whose rows are a sentence rather than a dialogue


def parse(doc: str, method_class: type[Method], argv: list[str] | None = None):
    """Read the command line of the recipe whose docstring is `doc`.

    Returns `(SharedArguments, method_class, TrainingArguments)`. Raises `UserError` for a flag that does not exist or can't
    be obeyed. `--help` prints the recipe's own flags first, then the shared ones; `--help_trainer` lists all the rest.
    """
    errors.install()
    argv = _bare_resume(sys.argv[1:] if argv is None else list(argv))
    trainer_flags = "\n".join(f"  {f'--{name} {default}':<46} {why}" for name, (default, why) in TRAINER_DEFAULTS.items())
    parser = Parser(prog=Path(sys.argv[0]).name, add_help=False, allow_abbrev=False,
                    usage="%(prog)s [flags]", formatter_class=argparse.RawDescriptionHelpFormatter, description=(doc or "").strip(),
                    epilog=f"the Trainer, as the recipes set it:\n{trainer_flags}\n\n"
                           "All flags of transformers.TrainingArguments work: --help_trainer lists them.")
    add_fields(parser.add_argument_group("this recipe"), method_class)
    every = parser.add_argument_group("every recipe")
    add_fields(every, SharedArguments, lambda f: not {"task", "group"} & f.metadata.keys())
    every.add_argument("--output_dir", metavar="DIR", help="the run folder (default: runs/RECIPE-MODEL, or runs/RECIPE-RUN)")
    every.add_argument("-h", "--help", action="help", help="show this text")
    every.add_argument("--help_trainer", action="store_true", help="show the Trainer's flags")
    for kind, title in (("group", "{}"), ("task", "--task {}")):
        for name in dict.fromkeys(f.metadata[kind] for f in fields(SharedArguments) if kind in f.metadata):
            add_fields(parser.add_argument_group(title.format(name)), SharedArguments, lambda f, k=kind, n=name: f.metadata.get(k) == n)
    known, rest = parser.parse_known_args(argv)

    shared = SharedArguments(**{f.name: getattr(known, f.name) for f in fields(SharedArguments)})
    method = method_class(**{f.name: getattr(known, f.name) for f in fields(method_class)})
    defaults = {name: default for name, (default, _) in TRAINER_DEFAULTS.items()}
    for f in fields(method_class):
        if f.metadata.get("trainer"):
            given = any(word.split("=")[0] == f"--{f.name}" for word in argv)
            if not given:
                fitting = (value for name, value in f.metadata["others"].items() if name == shared.task or getattr(method, name, False))
                setattr(method, f.name, next(fitting, f.default))
            defaults[f.name] = getattr(method, f.name)
    defaults["output_dir"] = known.output_dir or f"runs/{Path(sys.argv[0]).stem}-{Path(shared.start_from or shared.model).name}"
    if shared.streaming:  # there are no epochs
        defaults |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.1}
    training = _training_arguments(["--help"] if known.help_trainer else rest, defaults, parser, shared.task)
    _check(shared, training, argv)
    method.check(shared, training)
    return shared, method, training


def add_fields(parser, cls, wanted=lambda f: True) -> None:
    """Add one flag for each `wanted` field of the dataclass `cls`, with the field's type, default and help."""
    hints = typing.get_type_hints(cls)
    for f in filter(wanted, fields(cls)):
        kind, text = hints[f.name], f.metadata["help"].replace("%", "%%")
        default = None if f.default is MISSING else f.default
        shown = text if default is None else f"{text} (default: {' '.join(default) if isinstance(default, tuple) else default})"
        if kind is bool:
            group = parser.add_mutually_exclusive_group()
            group.add_argument(f"--{f.name}", nargs="?", const=True, type=_boolean, default=default, help=shown)
            group.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
        elif typing.get_origin(kind) is typing.Literal:
            parser.add_argument(f"--{f.name}", choices=typing.get_args(kind), default=default, help=shown)
        elif typing.get_origin(kind) is list:
            [entry] = typing.get_args(kind)
            parser.add_argument(f"--{f.name}", nargs="+", type=entry, default=list(default), metavar=entry.__name__.upper(), help=shown)
        else:
            bounded = _number(kind, f.metadata["at_least"], f.metadata.get("below")) if "at_least" in f.metadata else kind
            parser.add_argument(f"--{f.name}", type=bounded, default=default, metavar=kind.__name__.upper(), help=shown)


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that tells a mistake in one sentence, like every other."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def _number(kind, at_least, below=None):
    """An argparse type: an int or a float, at_least <= number < below."""
    def convert(text: str):
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not at_least <= number < (math.inf if below is None else below):
            bounds = f"of at least {at_least}" + (f" and below {below}" if below is not None else "")
            raise argparse.ArgumentTypeError(f"'{text}' is not a {'whole ' if kind is int else ''}number {bounds}")
        return number

    return convert


positive, whole, not_negative = _number(int, 1), _number(int, 0), _number(float, 0)


def _bare_resume(argv: list[str]) -> list[str]:
    """`--resume_from_checkpoint` alone means the newest checkpoint of the run folder; the Trainer's parser wants a value."""
    out = []
    for i, word in enumerate(argv):
        out.append(word)
        if word == "--resume_from_checkpoint" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            out.append("True")
    return out


def _training_arguments(argv: list[str], defaults: dict, own: argparse.ArgumentParser, task: str):
    import torch
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)
    parser.error = Parser.error.__get__(parser)
    # transformers offers --no_X only for what is on by its own default, not by ours.
    argv = [f"--{word[5:]}=False" if word in ("--no_bf16", "--no_load_best_model_at_end") else word for word in argv]
    given = {word.split("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_") for word in argv if word.startswith("--")}
    defaults["use_cpu"] = not torch.accelerator.is_available()
    defaults["remove_unused_columns"] = False  # a collator takes what it needs; some is no argument of the model
    if not given & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
        # Dialogues, 8 a step: at once on a GPU; row by row on a CPU, where one row's activations stay in the cache. Short texts, 32.
        batch, accumulation = (32, 1) if task in SHORT else (1, 8) if defaults["use_cpu"] else (8, 1)
        defaults |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    if "per_device_eval_batch_size" not in given:
        defaults["per_device_eval_batch_size"] = 32 if task in SHORT else 1 if defaults["use_cpu"] else 8
    if not given & {"bf16", "fp16"}:
        from recipes.common.models import native_bf16

        defaults["bf16"] = native_bf16()
    if given & {"eval_strategy", "save_strategy"} and "load_best_model_at_end" not in given:
        # Keeping the best needs an evaluation beside every checkpoint; whoever changes either rhythm decides anew.
        defaults["load_best_model_at_end"] = False
        print("note: --load_best_model_at_end is off, as --eval_strategy or --save_strategy was given")
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [word for each in (own, parser) for action in each._actions for word in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help and --help_trainer list the flags"
        raise UserError(f"unknown flag {unknown[0]}: {hint}")
    values = {f.name: getattr(namespace, f.name) for f in fields(TrainingArguments) if f.init}
    try:
        training = TrainingArguments(**values | {name: value for name, value in defaults.items() if name not in given})
        get_reporting_integration_callbacks(training.report_to)
        return training
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"the Trainer refuses these flags: {' '.join(str(error).split())}") from error


def _check(shared: SharedArguments, training, argv: list[str]) -> None:
    for f in fields(SharedArguments):
        if f.metadata.get("task", shared.task) != shared.task and any(word.split("=")[0] == f"--{f.name}" for word in argv):
            raise UserError(f"--{f.name} is for --task {f.metadata['task']}; this is --task {shared.task}")
    if training.fp16 and training.device.type == "cpu":
        raise UserError("--fp16 needs a GPU: leave it out, or use --bf16, which a CPU can compute")
    if shared.multi_label:
        for name, given in (("class_weights", shared.class_weights != "none"), ("oos_label", shared.oos_label),
                            ("label_smoothing_factor", training.label_smoothing_factor)):
            if given:
                raise UserError(f"--{name} is for rows with one label each: leave it out, or leave out --multi_label")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            raise UserError(f"--{name} {getattr(training, name)}: use 1 or more")
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        raise UserError(f"--num_train_epochs {training.num_train_epochs:g} trains nothing: use more than 0")
    if shared.streaming:
        if training.max_steps <= 0:
            raise UserError("--streaming does not know how many rows there are: say how long to train with --max_steps N")
        for name in ("replay", "measure_forgetting", "max_train_samples"):
            if getattr(shared, name):
                raise UserError(f"--{name} needs to know all rows, and --streaming never does: leave one of them out")
        if training.dataloader_num_workers:
            raise UserError("--dataloader_num_workers: the process that trains reads the stream as well: leave it out")
        if training.train_sampling_strategy != "random":
            raise UserError(f"--train_sampling_strategy {training.train_sampling_strategy}: a stream comes in its own order: leave it out")
    if shared.start_from and any(word.split("=")[0] == "--model" for word in argv):
        raise UserError("--start_from takes the model of the run: leave --model out")
    if shared.replay and shared.measure_forgetting:
        raise UserError("--replay measures forgetting on its own source: leave --measure_forgetting out")
    if not 0 < shared.dev_fraction < 1:
        raise UserError(f"--dev_fraction {shared.dev_fraction} is no share: use a number between 0 and 1, such as 0.1")
    if shared.early_stopping_patience and not training.load_best_model_at_end:
        raise UserError("--early_stopping_patience needs --load_best_model_at_end with equal --eval_strategy and --save_strategy")
    if training.n_gpu > 1:
        raise UserError(f"one process sees {training.n_gpu} GPUs: start one per GPU with `accelerate launch --config_file "
                        "recipes/accelerate/ddp.yaml scripts/train.py ...`, or choose one with CUDA_VISIBLE_DEVICES=0")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and training.world_size == 1:
        raise UserError(f"{launched} processes were launched but do not form a group, so each would train alone: "
                        f"use `torchrun --nproc_per_node {launched} scripts/train.py ... --use_cpu` on a CPU")
