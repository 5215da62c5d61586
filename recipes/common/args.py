"""The flags that all recipes share, and `parse`, which reads a recipe's command line.

A recipe's own flags are the fields of its `MethodArguments`. Everything else is `transformers.TrainingArguments`, whose flags
all work under their own names. `transformers` is imported only once the command line is known to ask for a run, so that
`--help` and a mistyped flag answer at once.
"""

import argparse
import difflib
import json
import math
import os
import sys
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from recipes.common import errors, processes
from recipes.common.errors import UserError


def option(default, help, others=None, **metadata):
    """A dataclass field with its help text: one flag of a recipe. `at_least` and `below` bound a number; `search` holds the values that
    scripts/compare.py --search tries. `others` of a recipe's own flags are defaults for a task ({"classify": 20}), or for a flag that is
    switched on ({"prefix_projection": 1e-3}); the first that fits counts."""
    shown = "".join(f"; {value:g} with {name}" for name, value in (others or {}).items())
    return field(default=default, metadata={"help": help + shown, **({"others": others} if others else {}), **metadata})


def trainer_option(default, help, **others):
    """A flag of `TrainingArguments` for which the recipe has a better default; `others` as in `option`."""
    return option(default, help, others, trainer=True, at_least=0)


FAULTS = "when a run is interrupted or goes wrong"
WRITING = ("chat", "translate")  # tasks whose models write text
WRITTEN = ("bleu", "rougeL", "chrf")  # metrics of what they write
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
# What the dev rows of a task are scored by.
DEV_SCORES = {"chat": ("loss", "perplexity", *WRITTEN), "translate": ("loss", "perplexity", *WRITTEN),
              "classify": ("loss", "accuracy", "f1_macro"), "tag": ("loss", "f1", "precision", "recall"),
              "pretrain": LOWER_IS_BETTER}
# Which of them says what is best, where it is not the loss: a classifier goes on learning to tell labels apart when its loss rises again,
# as it grows too sure of its mistakes.
BEST_BY = {"classify": "accuracy", "tag": "f1"}


@dataclass
class SharedArguments:
    """What every recipe needs to know besides `TrainingArguments`."""

    model: str = option("smollm2", "Hub id (gpt2, Qwen/Qwen3-0.6B), a folder, or a bundled name: smollm2, minilm, gemma3")
    data: list[str] = option(("data/customer_service",), "files, folders with train/dev/test files, or Hub ids, in any format of "
                             "data/README.md; NAME:WEIGHT each: their shares of the train rows, as in a.jsonl:0.7 b.csv:0.3")
    columns: str = option(None, "rename columns, NEW=OLD: source=question,target=answer; within an object, source=translation.en")
    split: str = option(None, "names of the splits, where they are not train, dev and test: train=train_sft,dev=test_sft")
    task: typing.Literal["chat", "classify", "tag", "translate", "pretrain"] = option(
        "chat", "what the rows are: data/README.md holds each task's columns")
    fallback_model: str = option(None, "use this model, with a banner that says so, when the Hub can't be reached")
    max_length: int = option(None, "tokens a row may have (default: the task's, 768 for chat); a longer dialogue loses whole turns, the "
                             "oldest first", at_least=8)
    dev_fraction: float = option(0.1, "share of the train dialogues held out as dev where the data has no dev file")
    on_bad_row: typing.Literal["stop", "skip"] = option("stop", "a row that breaks the contract: stop, or leave out and list")
    max_train_samples: int = option(None, "train on the first N rows only (for a quick trial)", at_least=1)
    max_eval_samples: int = option(None, "evaluate on the first N dev rows only", at_least=1)
    train_fraction: float = option(1.0, "train on this share of the train rows, drawn with --seed; a smaller share is part of a larger one",
                                   at_least=0)
    max_tokens: int = option(None, "train on about N tokens, in place of --num_train_epochs", at_least=1)
    max_minutes: float = option(None, "end the training after so many minutes, wherever its schedule stands", at_least=0)
    streaming: bool = option(False, "read the train rows while training, from sources of any size, and keep nothing; needs --max_steps")
    shuffle_buffer: int = option(10_000, "of --streaming: rows among which the next one is drawn", at_least=1)
    preprocessing_num_workers: int = option(None, "processes that tokenize (default: one a CPU core)", at_least=1)
    early_stopping_patience: int = option(0, "stop after N evaluations without a better dev loss (or --metric_for_best_model); 0: never",
                                          at_least=0)

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

    eval_generate_rows: int = option(0, "at each evaluation, answer N dev turns or pairs too: metrics bleu, rougeL and chrf, "
                                     "against one reference each, as in --metric_for_best_model rougeL; 0: none", task=WRITING, at_least=0)
    eval_generate_tokens: int = option(128, "longest of these answers", task=WRITING, at_least=1)
    eval_generate_seconds: float = option(60.0, "begin no further batch of these answers after so many seconds; how many were answered is "
                                          "told, but what was answered then depends on the machine", task=WRITING, at_least=1)

    start_from: str = option(None, "go on from this finished run on new data, with its model, template and labels; an adapter by its own "
                             "recipe", group="continual fine-tuning")
    replay: str = option(None, "SOURCE:SHARE mixes old or general rows in: SHARE of the train rows come from there, as in old.jsonl:0.2",
                         group="continual fine-tuning")
    measure_forgetting: str = option(None, "score this data's dev rows before and after the training; --replay does so by itself",
                                     group="continual fine-tuning")

    tokens_per_step: int = option(None, "an optimizer step holds about N tokens, of all processes together, in place of a number of rows",
                                  at_least=1, group="speed")
    micro_batch_tokens: int = option(None, "run rows of a step together up to N tokens, padding included; changes time and memory, not the "
                                     "result. 0: what suits the hardware (the default, unless the Trainer's batch flags are given)",
                                     at_least=0, group="speed")
    attention: typing.Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = option(
        "auto", "attention kernel; auto: sdpa; on a CPU this project's own; on a GPU flash_attention_2 where flash-attn is installed",
        group="speed")

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

    on_nan: typing.Literal["stop", "skip", "rollback"] = option("stop", "a loss or gradient that is not finite: stop and name the rows, "
                                                                "leave the step out, or also go back to the last checkpoint", group=FAULTS)
    data_timeout: int = option(600, "end the run when no row has come for so many seconds, in reading, tokenizing, training or evaluating; "
                               "0: never", at_least=0, group=FAULTS)
    allow_changed: str = option(None, "on --resume_from_checkpoint: arguments that may differ from before, as in num_train_epochs,rows",
                                group=FAULTS)
    repeats: str = option(None, "the run.json that this run repeats (scripts/train.py --config sets it): changed data are said",
                          group=FAULTS)

    instruction: str = option(None, "what a decoder-only model is told before the source (Translate to Chinese:)", task="translate")
    source_prefix: str = option(None, "what an encoder-decoder reads before the source (T5: translate English to German: )",
                                task="translate")
    next_sentence: bool = option(False, "encoders with BERT's head for it: also learn whether the second text of a pair follows the first",
                                 task="pretrain")
    from_scratch: bool = option(False, "only the architecture of --model: weights drawn at random (--seed)", task="pretrain")
    vocab_size: int = option(None, "with --from_scratch: train a tokenizer of the model's kind, of N tokens, on the train rows (default: "
                             "the model's own tokenizer)", task="pretrain", at_least=8)
    model_type: str = option(None, "with --from_scratch: this architecture of transformers (gpt2, llama, bert ...) in its default sizes; "
                             "--model then gives only the tokenizer", task="pretrain")
    config_overrides: str = option(None, "with --from_scratch: other sizes, as in num_hidden_layers=4,hidden_size=256", task="pretrain")


@dataclass
class Method:
    """Base of every recipe's `MethodArguments`."""

    learns_from_scratch = False  # whether every weight is trained, so that --from_scratch makes sense
    # What PEFT calls the adapter that is made (peft.PeftType), "" if there is none: of None it is known once a model was adapted.
    peft_method: typing.ClassVar[str | None] = None
    load_in_4bit = False  # a method that freezes the matrices may have a flag of this name

    def check(self, shared: SharedArguments, training) -> None:
        """Raise `UserError` for a combination of flags that this method can't do."""

    def positions(self) -> int:
        """How many positions of the model's window this method takes for itself."""
        return 0

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
    "metric_for_best_model": ("loss", "what 'best' means; for classify it is accuracy, for tag f1"),
    "greater_is_better": (None, "as is right for that metric"),
    "include_num_input_tokens_seen": ("non_padding", "count the tokens trained on, for tokens per second"),
    "report_to": ("tensorboard", "event files in the run folder; 'none' for none"),
}

# Flags that decide which rows are read, how long they are waited for, and what a model makes of them; scripts/doctor.py takes the same.
READING = ("data", "columns", "split", "task", "fallback_model", "max_length", "dev_fraction", "on_bad_row", "label", "context_turns",
           "multi_label", "oos_label", "instruction", "source_prefix", "next_sentence", "data_timeout")
SEED = 42  # the Trainer's default

SHORT = ("classify", "tag", "translate")  # tasks whose rows are a sentence rather than a dialogue


def parse(doc: str, method_class: type[Method], argv: list[str] | None = None):
    """Read the command line of the recipe whose docstring is `doc`.

    Returns `(SharedArguments, method_class, TrainingArguments)`. Raises `UserError` for a flag that does not exist or can't
    be obeyed. `--help` prints the recipe's own flags first, then the shared ones; `--help_trainer` lists all the rest.
    """
    errors.install()
    argv = _bare_resume(underscored(sys.argv[1:] if argv is None else argv))
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
            shown = title.format(name if isinstance(name, str) else " or ".join(name))
            add_fields(parser.add_argument_group(shown), SharedArguments, lambda f, k=kind, n=name: f.metadata.get(k) == n)
    known, rest = parser.parse_known_args(argv)
    check_launch()

    shared = SharedArguments(**{f.name: getattr(known, f.name) for f in fields(SharedArguments)})
    method = method_class(**{f.name: getattr(known, f.name) for f in fields(method_class)})
    defaults = {name: default for name, (default, _) in TRAINER_DEFAULTS.items()}
    for f in fields(method_class):
        others = f.metadata.get("others", {})
        if others and f"--{f.name}" not in named(argv):
            fitting = (value for name, value in others.items() if name == shared.task or getattr(method, name, False)
                       or getattr(shared, name, False))
            setattr(method, f.name, next(fitting, f.default))
        if f.metadata.get("trainer"):
            defaults[f.name] = getattr(method, f.name)
    defaults["output_dir"] = known.output_dir or f"runs/{Path(sys.argv[0]).stem}-{Path(shared.start_from or shared.model).name}"
    if shared.streaming:  # there are no epochs
        defaults |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.1}
    training = _training_arguments(["--help"] if known.help_trainer else rest, defaults, parser, shared)
    _check(shared, training, argv)
    if shared.from_scratch and not method.learns_from_scratch:
        raise UserError("--from_scratch draws every weight at random, and this recipe would leave most of them so: use --recipe full")
    method.check(shared, training)
    return shared, method, training


def of_record(record: dict, method_class: type[Method]) -> list[str]:
    """The flags that give the run of `record` (a run.json) again, but for --output_dir, for the recipe with this `method_class`."""
    from transformers import TrainingArguments

    shared, method, training = (record[f"{name}_arguments"] for name in ("shared", "method", "training"))
    if record["model"]["used"] != record["model"]["requested"] and not shared["start_from"] and not shared.get("from_scratch"):
        shared = shared | {"model": record["model"]["used"]}  # a fallback, which stands for nothing else now
    own = {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields(SharedArguments)}
    wanted = {name: value for name, value in shared.items() if value != own.get(name) and name not in ("allow_changed", "repeats")}
    wanted |= {f.name: method[f.name] for f in fields(method_class) if f.name in method}
    plain = json.loads(json.dumps(TrainingArguments(output_dir=training["output_dir"], use_cpu=training["use_cpu"]).to_dict(), default=str))
    plain |= {name: default for name, (default, _) in TRAINER_DEFAULTS.items()} | {"report_to": ["tensorboard"]}
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size", "bf16", "use_cpu",
                 "load_best_model_at_end"):
        plain.pop(name)  # their defaults depend on the hardware and on other flags
    wanted |= {name: value for name, value in training.items() if value != plain.get(name) if name not in wanted
               and name not in ("output_dir", "resume_from_checkpoint", "local_rank") and not name.endswith("_token")}
    words = []
    for name, value in wanted.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value or ["none"])]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


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


def underscored(argv: list[str]) -> list[str]:
    """A command line with its flags as --a_b, for which the Trainer's parser takes --a-b too."""
    parts = (word.partition("=") if word.startswith("--") else ("", "", word) for word in argv)
    return [flag.replace("-", "_").replace("__", "--", 1) + rest + value for flag, rest, value in parts]


def _bare_resume(argv: list[str]) -> list[str]:
    """`--resume_from_checkpoint` alone means the newest checkpoint of the run folder; the Trainer's parser wants a value."""
    out = []
    for i, word in enumerate(argv):
        out.append(word)
        if word == "--resume_from_checkpoint" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            out.append("True")
    return out


def _training_arguments(argv: list[str], defaults: dict, own: argparse.ArgumentParser, shared: SharedArguments):
    import torch
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)
    parser.error = Parser.error.__get__(parser)
    # transformers offers --no_X only for what is on by its own default, not by ours.
    argv = [f"--{word[5:]}=False" if word in ("--no_bf16", "--no_load_best_model_at_end") else word for word in argv]
    given = {word.split("=")[0].removeprefix("--").removeprefix("no_") for word in argv if word.startswith("--")}
    defaults["use_cpu"] = not torch.accelerator.is_available()
    defaults["remove_unused_columns"] = False  # a collator takes what it needs; some is no argument of the model
    sizes = given & {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if not sizes:
        # The rows of a step: 8 dialogues, or 32 short texts. How many of them run together is another matter (batches.py).
        defaults["per_device_train_batch_size"] = 32 if shared.task in SHORT else 8
    if shared.micro_batch_tokens is None and (shared.tokens_per_step or not sizes):
        shared.micro_batch_tokens = 0
    if shared.tokens_per_step and "per_device_train_batch_size" in given:
        print("note: --tokens_per_step decides what a step holds, whatever --per_device_train_batch_size says")
    if "per_device_eval_batch_size" not in given:
        defaults["per_device_eval_batch_size"] = 32 if shared.task in SHORT else 1 if defaults["use_cpu"] else 8
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
    gpus, local = torch.accelerator.device_count(), _count_of("LOCAL_RANK", 0, 0)
    if gpus and local >= gpus and not values["use_cpu"]:
        raise UserError(f"LOCAL_RANK={local}, and this machine has {gpus} GPU{'s' if gpus > 1 else ''}: start one process a GPU "
                        f"(--nproc_per_node {gpus}), or one task a GPU with `srun --ntasks-per-node {gpus}`")
    meet(values["ddp_timeout"] if "ddp_timeout" in given else COME_WITHIN)
    try:
        training = TrainingArguments(**values | {name: value for name, value in defaults.items() if name not in given})
        get_reporting_integration_callbacks(training.report_to)
        return training
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"the Trainer refuses these flags: {' '.join(str(error).split())}") from error


def named(argv: list[str]) -> set[str]:
    """The flags that a command line names, as --flag."""
    return {word.split("=")[0] for word in argv}


def check_task(shared: SharedArguments, argv: list[str]) -> None:
    """Raise `UserError` if the command line has a flag of another task."""
    flags = named(argv)
    for name, theirs in of_other_tasks(shared.task).items():
        if f"--{name}" in flags:
            raise UserError(f"--{name} is for --task {' or '.join(theirs)}; this is --task {shared.task}")


def of_other_tasks(task: str) -> dict[str, tuple[str, ...]]:
    """The flags of `SharedArguments` that the task `task` does not read, and the tasks that do."""
    declared = ((f.name, f.metadata.get("task", task)) for f in fields(SharedArguments))
    every = {name: (theirs,) if isinstance(theirs, str) else theirs for name, theirs in declared}
    return {name: theirs for name, theirs in every.items() if task not in theirs}


def dev_scores(shared: SharedArguments) -> list[str]:
    """The scores that each evaluation while training gives; those of written answers only where some are written."""
    return [name for name in _dev_scores_known(shared) if name not in WRITTEN or shared.eval_generate_rows]


def _dev_scores_known(shared: SharedArguments) -> list[str]:
    return [*DEV_SCORES[shared.task], *(["f1_micro"] if shared.multi_label else []),
            *(["next_sentence_accuracy"] if shared.next_sentence else [])]


def _check_best(shared: SharedArguments, training, argv: list[str]) -> None:
    """Which checkpoint is the best: by a score that there will be, and in the direction that is right for it."""
    if training.metric_for_best_model == "loss" and "--metric_for_best_model" not in named(argv):
        training.metric_for_best_model = BEST_BY.get(shared.task, "loss")
    best = (training.metric_for_best_model or "").removeprefix("eval_")
    if not best:
        return
    if best not in (there := _dev_scores_known(shared)):
        raise UserError(f"--metric_for_best_model {best}: dev rows of --task {shared.task} are scored by {', '.join(there)}: name one")
    if best in WRITTEN and not shared.eval_generate_rows:
        raise UserError(f"--metric_for_best_model {best} is a score of written answers: add --eval_generate_rows 32")
    greater = best not in LOWER_IS_BETTER
    if "--greater_is_better" in named(argv) and training.greater_is_better != greater:
        raise UserError(f"--metric_for_best_model {best} would keep the worst checkpoint with "
                        f"--greater_is_better {not greater}: leave that out")
    training.greater_is_better = greater


def _check(shared: SharedArguments, training, argv: list[str]) -> None:
    check_task(shared, argv)
    for name in ("save", "eval"):
        strategy = getattr(training, f"{name}_strategy")
        if strategy == "epoch" and f"--{name}_steps" in named(argv):
            raise UserError(f"--{name}_steps counts only with --{name}_strategy steps, and that is {strategy.value}: add it")
    _check_best(shared, training, argv)
    if training.fp16 and training.device.type == "cpu":
        raise UserError("--fp16 needs a GPU: leave it out, or use --bf16, which a CPU can compute")
    if shared.tokens_per_step and training.gradient_accumulation_steps > 1:
        raise UserError("--tokens_per_step is what a whole step holds: leave --gradient_accumulation_steps out")
    for name, needed, there in (("adversarial_epsilon", "--adversarial fgm or pgd", shared.adversarial != "none"),
                                ("eval_generate_tokens", "--eval_generate_rows N", shared.eval_generate_rows),
                                ("eval_generate_seconds", "--eval_generate_rows N", shared.eval_generate_rows),
                                ("shuffle_buffer", "--streaming", shared.streaming)):
        if f"--{name}" in named(argv) and not there:
            raise UserError(f"--{name} changes nothing without {needed}: add that, or leave it out")
    strategy = training.train_sampling_strategy
    if shared.tokens_per_step and strategy not in ("random", "sequential"):
        raise UserError(f"--train_sampling_strategy {strategy} can't be combined with --tokens_per_step: leave one of them out")
    if shared.multi_label:
        for name, given in (("class_weights", shared.class_weights != "none"), ("oos_label", shared.oos_label),
                            ("label_smoothing_factor", training.label_smoothing_factor)):
            if given:
                raise UserError(f"--{name} is for rows with one label each: leave it out, or leave out --multi_label")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            raise UserError(f"--{name} {getattr(training, name)}: use 1 or more")
    if training.torch_compile:
        from recipes.common import compilation

        compilation.check(training)
    for name, why in (("auto_find_batch_size", "batches are halved by themselves when memory runs out, and the step keeps its rows"),
                      ("enable_jit_checkpoint", "SIGTERM writes a checkpoint by itself"),
                      ("restore_callback_states_from_checkpoint", "a resume restores them by itself")):
        if getattr(training, name):
            raise UserError(f"--{name}: {why}; leave it out")
    if training.save_only_model and shared.on_nan == "rollback":
        raise UserError("--on_nan rollback goes back to a checkpoint's optimizer, and --save_only_model keeps none: leave one of them out")
    if not 0 <= training.label_smoothing_factor < 1:
        raise UserError(f"--label_smoothing_factor {training.label_smoothing_factor:g} is no share of the loss: use a number of at least 0 "
                        "and below 1, such as 0.1")
    if shared.layer_lr_decay > 1:
        raise UserError(f"--layer_lr_decay {shared.layer_lr_decay:g} would let the lower blocks learn faster than those above them: use a "
                        "number of up to 1, such as 0.9")
    if shared.adversarial != "none" and not shared.adversarial_epsilon:
        raise UserError(f"--adversarial_epsilon 0 disturbs nothing, and --adversarial {shared.adversarial} takes its time all the same: "
                        "leave both out, or give a number above 0, such as 0.05")
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        raise UserError(f"--num_train_epochs {training.num_train_epochs:g} trains nothing: use more than 0")
    if shared.streaming:
        for name in ("replay", "measure_forgetting", "max_train_samples", "train_fraction", "max_tokens", "tokens_per_step"):
            if getattr(shared, name) != getattr(SharedArguments, name):
                raise UserError(f"--{name} needs to know all rows, and --streaming never does: leave one of them out")
        if training.max_steps <= 0:
            raise UserError("--streaming does not know how many rows there are: say how long to train with --max_steps N")
        if training.dataloader_num_workers:
            raise UserError("--dataloader_num_workers: the process that trains reads the stream as well: leave it out")
        if training.train_sampling_strategy != "random":
            raise UserError(f"--train_sampling_strategy {training.train_sampling_strategy}: a stream comes in its own order: leave it out")
    if not 0 < shared.train_fraction <= 1:
        raise UserError(f"--train_fraction {shared.train_fraction:g} is no share: use a number above 0 and up to 1, such as 0.5")
    if shared.max_tokens and named(argv) & {"--max_steps", "--num_train_epochs"}:
        raise UserError("--max_tokens says how long to train: leave --max_steps and --num_train_epochs out")
    if shared.start_from and "--model" in named(argv):
        raise UserError("--start_from takes the model of the run: leave --model out")
    if shared.start_from and shared.from_scratch:
        raise UserError("--start_from goes on from what a run has learned: leave --from_scratch out")
    for name in ("vocab_size", "model_type", "config_overrides"):
        if getattr(shared, name) is not None and not shared.from_scratch:
            raise UserError(f"--{name} changes a model that is trained from the beginning: add --from_scratch, or leave it out")
    if shared.repeats and not Path(shared.repeats).is_file():
        raise UserError(f"--repeats {shared.repeats}: no such file; name the run.json of a finished run")
    if shared.repeats:
        _check_processes_of_repeat(shared, training)
    if shared.replay and shared.measure_forgetting:
        raise UserError("--replay measures forgetting on its own source: leave --measure_forgetting out")
    if not 0 < shared.dev_fraction < 1:
        raise UserError(f"--dev_fraction {shared.dev_fraction} is no share: use a number between 0 and 1, such as 0.1")
    if shared.early_stopping_patience and not training.load_best_model_at_end:
        raise UserError("--early_stopping_patience needs --load_best_model_at_end with equal --eval_strategy and --save_strategy")
    if training.n_gpu > 1:
        raise UserError(f"one process sees {training.n_gpu} GPUs: start one per GPU with `accelerate launch --config_file "
                        "recipes/accelerate/ddp.yaml scripts/train.py ...`, or choose one with CUDA_VISIBLE_DEVICES=0")
    check_group(training.world_size, training.device.type, "--use_cpu" in named(argv))


SLURM = "use recipes/slurm/train.sbatch, or `srun -n 1` for a single process"
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # how many srun or mpirun started
MEETING = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torch finds a group by
COME_WITHIN = 300  # seconds from the first process to the last, unless --ddp_timeout is given


def _check_processes_of_repeat(shared: SharedArguments, training) -> None:
    """Raise `UserError` if the run that is to be repeated had another number of processes, and so other steps. They are allowed by name."""
    record = json.loads(Path(shared.repeats).read_text(encoding="utf-8"))
    before, now = record.get("world_size", training.world_size), training.world_size  # older records don't say it
    then = record["training_arguments"]
    rows = [(each["per_device_train_batch_size"], each["gradient_accumulation_steps"]) for each in (then, training.to_dict())]
    if before == now or "world_size" in (shared.allow_changed or "").split(","):
        return
    there, here = (a * b * size for (a, b), size in zip(rows, (before, now), strict=True))
    effect = "its steps have as many rows, in another order and with other sums"
    if there != here and not shared.tokens_per_step:
        effect = f"a step would have {here} rows in place of {there}, which gives another run"
    raise UserError(f"--config {shared.repeats}: that run had {before} process{'es' if before > 1 else ''}, and here {now} "
                    f"{'are' if now > 1 else 'is'}: {effect}; start {before}, or allow it with --allow_changed world_size (and give "
                    "--per_device_train_batch_size for as many rows a step)")


def check_launch() -> None:
    """Raise `UserError` where the environment says that several processes were started which can't form a group, so that each would train
    alone and write into the same folder, or wait for ever. Loads nothing."""
    environ, launched = os.environ, {name: os.environ[name] for name in MEETING if name in os.environ}
    right = ("use `accelerate launch --config_file recipes/accelerate/cpu_processes.yaml scripts/train.py ...` (GPUs: ddp.yaml) "
             f"or `torchrun --nproc_per_node 2 scripts/train.py ...`; on Slurm {SLURM}")
    tasks = max((_count_of(name) for name in TASKS if name in environ), default=_count_of("SLURM_NTASKS"))
    if _count_of("WORLD_SIZE") == 1 and "LOCAL_RANK" not in launched and _count_of("RANK", 0, 0) == 0:
        if tasks > 1:
            name = next((name for name in TASKS if _count_of(name) == tasks), "SLURM_NTASKS")
            raise UserError(f"{tasks} processes were launched ({name}) that form no group, so each would train alone: {right}")
        # accelerate launch sets the address for several processes even where it then starts a single one.
        if "MASTER_ADDR" in environ and "ACCELERATE_MIXED_PRECISION" in environ:
            raise UserError(f"accelerate launch was asked for several processes and started a single one: {right}")
        return
    size = _count_of("WORLD_SIZE")
    if missing := [name for name in MEETING if name not in launched]:
        raise UserError(f"this process was launched as one of several ({', '.join(f'{n}={v}' for n, v in launched.items())}), but "
                        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, so they form no group: {right}; a single "
                        f"process needs none of these variables")
    rank, local, here = _count_of("RANK", 0), _count_of("LOCAL_RANK", 0), _count_of("LOCAL_WORLD_SIZE", 0, size)
    if rank >= size or local >= here:
        name, value, limit = ("RANK", rank, size) if rank >= size else ("LOCAL_RANK", local, here)
        raise UserError(f"{name}={value}, where {limit} {'processes were' if limit > 1 else 'process was'} announced: it counts from 0 to "
                        f"{limit - 1}; {right}")
    _count_of("MASTER_PORT")
    groups = _count_of("GROUP_WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in environ else size
    if max((_count_of(name) for name in TASKS if name in environ), default=1) > groups:
        raise UserError(f"{tasks} tasks were started, but this process belongs to a group of {groups}, so several groups would each train "
                        f"alone: give torchrun --nnodes {tasks} and one --rdzv_endpoint for all (README.md), or use "
                        "recipes/slurm/train.sbatch")


def _count_of(name: str, least: int = 1, default: int = 1) -> int:
    """The number that an environment variable holds. Raises `UserError` if it holds anything else."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text} in the environment is not a whole number of at least {least}: unset it, or let torchrun set it")
    return int(text)


def meet(seconds: int = COME_WITHIN) -> None:
    """Raise `UserError` unless all processes that were launched are there within so many seconds."""
    if wrong := processes.all_there(seconds):
        raise UserError(wrong)


def check_group(world_size: int, device: str, use_cpu: bool) -> None:
    """Raise `UserError` where the processes that were launched got no group, or not the devices that they were launched for."""
    launched = processes.count()
    if launched > 1 and world_size == 1:
        raise UserError(f"{launched} processes were launched that form no group, so each would train alone: use `accelerate launch "
                        f"--config_file recipes/accelerate/{'cpu_processes' if device == 'cpu' else 'ddp'}.yaml scripts/train.py ...`, or "
                        f"`torchrun --nproc_per_node {launched} scripts/train.py ...`")
    # On CPUs accelerate launch forms a group where its file asks for FSDP2 (cpu_processes.yaml).
    for_gpus = "ACCELERATE_USE_FSDP" not in os.environ or os.environ.get("FSDP_VERSION") != "2"
    if launched > 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and for_gpus and device == "cpu" and not use_cpu:
        raise UserError("accelerate launch was asked for several GPUs, and there is none here: use --config_file "
                        "recipes/accelerate/cpu_processes.yaml, or see with nvidia-smi why the GPUs are not found")
