"""What is learned: a task is a record of its rows, how they become features, and how a batch of them is scored.

A task never sees the method, and a method only sees the task's name and PEFT type, so any method goes with any task. Each module of this
folder is one task, found by its file name, and has five functions:

    check(shared)                      -> a function from a row to what is wrong with it, or None (data.Check)
    rows(rows, shared)                 -> the task's own rows, where a file's rows hold several (a dialogue holds many turns)
    facts(rows, shared)                -> what the train rows say that the model must know (its labels); kept in run.json
    make(shared, source, tokenizer, facts) -> Task
    evaluate(candidates, task, rows, record, options) -> the scores (evaluation.result)

and the constant MODELS, which says for each kind of model (models.KINDS) with which of transformers' AutoModelFor... classes it does the
task, or why it can't. With what a method says itself (args.Method.refuses), this is the table of what works with what. Only pretrain has
`from_scratch`, for the flag of this name.
"""

import functools
import importlib
import itertools
import random
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from datasets import Dataset

from recipes.common import args, batches, data, deadline, disk, doctor, encoding, losses, models, regularize, streaming, trained
from recipes.common.errors import UserError
from recipes.common.wording import counted

DEV_ROWS = 500  # of a stream without a dev file, unless --max_eval_samples says so
# Flags that leave the features of the rows alone, or name what is looked at in itself: the model's tokenizer and config, the run's record.
NOT_OF_ROWS = {"model", "fallback_model", "start_from", "from_scratch", "vocab_size", "model_type", "config_overrides",
               "preprocessing_num_workers", "early_stopping_patience",
               "layer_lr_decay", "model_dropout", "adversarial", "adversarial_epsilon", "r_drop",
               "tokens_per_step", "micro_batch_tokens", "attention", "max_tokens", "max_minutes", "eval_generate_rows",
               "eval_generate_tokens", "eval_generate_seconds", "on_nan", "data_timeout", "allow_changed", "repeats"}

READ_ALIKE = ("context_turns", "oos_label", "instruction", "source_prefix")  # what a run that goes on had better read as before


@dataclass
class Task:
    """A task for one model; `load` adds the data."""

    name: str
    peft_type: str | None  # peft.TaskType
    auto_class: type  # which of transformers' AutoModelFor... classes
    source: models.Source
    tokenizer: object
    max_length: int  # tokens of the longest row
    encode: Callable[..., tuple[Dataset, dict]]  # (rows, name, on_bad_row, training) -> features, counts of what was shortened and left out
    one: encoding.One | None = field(default=None, kw_only=True)  # what encode does with a row, for tasks whose rows can be streamed
    collate: Callable[[list[dict]], dict[str, torch.Tensor]]
    texts: tuple[str, ...] = field(default=("input_ids",), kw_only=True)  # columns of tokens that are counted; of pairs, the target too
    loss: Callable[..., list[losses.Part]]
    outputs: Callable[[list[losses.Part]], tuple] = lambda parts: ()  # tensors (batch, ...) that `metrics` needs
    metrics: Callable[..., dict[str, float]] = lambda *outputs_and_labels: {}  # beside the loss, of all dev rows
    per_token: bool = True  # whether the loss is that of tokens, so that its exponential is a perplexity
    config: dict = field(default_factory=dict)  # what the model's config must say: its labels, its padding
    dropout: dict = field(default_factory=dict)  # what --model_dropout changes in the config while training
    generation: object = None  # transformers.GenerationConfig, for tasks that write
    callbacks: list = field(default_factory=list)  # that the task needs while training
    start_head: Callable | None = None  # (model, task) sets a new head to what the train rows tell
    head: str | None = None  # the new head's name where PEFT does not know it
    drawn_at_random: list[str] = field(default_factory=list)  # modules that the checkpoint of load_model lacked
    head_given: bool = False  # whether the adapter that this run goes on from brings what the checkpoint lacks
    window: int | None = None  # tokens the model can read, if it says so
    train: Dataset = None
    steps: int = None  # an epoch's optimizer steps, where --tokens_per_step decides them
    dev: Dataset = None
    old: Dataset = None  # rows on which forgetting is measured
    lineage: list[dict] = field(default_factory=list)  # the runs that this one goes on from, the first one first
    method_report: dict = field(default_factory=dict)  # what a method has to say after the training
    report: dict = field(default_factory=dict)  # what was read, shortened and left out: goes into run.json
    members: list["Task"] = field(default_factory=list)  # of an ensemble: those of the runs that answer together

    def readers(self) -> list["Task"]:
        """The tasks by which rows are read: itself, or those of an ensemble."""
        return self.members or [self]

    def load_model(self, in_4bit: bool = False):
        """The model that training starts from, once `train` is there; `in_4bit`: its frozen matrices in 4 bits."""
        quantized = {"quantization_config": models.quantization(self.peft_type)} if in_4bit else {}
        model = models.load(self.source, self.auto_class, completed=self.head_given, **self.config | self.dropout | quantized)
        if self.generation:
            model.generation_config = self.generation
        self.drawn_at_random = model.drawn_at_random
        if self.start_head and self.train is not None and self.drawn_at_random and not self.head_given:
            self.start_head(model, self)
        return model

    def new_modules(self) -> list[str] | None:
        """Modules for PEFT to train and save whole: a head that it does not know, and what the checkpoint lacked (a pooler)."""
        heads = {*models.HEADS, self.head}
        names = [name for name in self.drawn_at_random if not heads & set(name.split("."))]
        return [*names, *([self.head] if self.head else [])] or None


def module(name: str):
    """The module of task `name`."""
    return importlib.import_module(f"recipes.common.tasks.{name}")


def why_not(task: str, kind: str, method) -> str | None:
    """Why the task `task` can't be learned with models of this kind (models.KINDS) by `method` (args.Method), or None if it can."""
    found = module(task).MODELS[kind]
    return found if isinstance(found, str) else method.refuses(task, kind)


def check_cell(task: str, source: models.Source, method) -> None:
    """Raise `UserError` if this task, model and method do not go together. Reads the model's config, and no data."""
    kind, config = models.kind(source), models.config(source)
    if reason := why_not(task, kind, method):
        raise UserError(f"--task {task}: {source.used} is {models.KINDS[kind]}, and {reason}")
    if type(config) not in module(task).MODELS[kind]._model_mapping:
        raise UserError(f"--task {task}: transformers has no model of the type {config.model_type} for it: use another than {source.used}")


def load(shared, method, training) -> Task:
    """Find the model `shared.model`, then read and tokenize the rows of `shared.task` for it, or take them from the cache if that was done
    before; prints what was read. Raises `UserError`, before any data is read if `method` (args.Method), task and model do not go together.

    Of several processes, the first one does the work, and the others find it in the cache.
    """
    deadline.limit = shared.data_timeout
    with training.main_process_first(desc="reading the rows"):
        task = _load(shared, method, training)
    if training.process_index == 0:
        print_report(task)
        if shared.max_tokens:
            print(f"--max_tokens {shared.max_tokens}: {training.num_train_epochs:.2f} passes over the train rows")
    return task


def _load(shared, method, training) -> Task:
    kind, run, record = module(shared.task), None, {}
    if shared.start_from:
        run = Path(shared.start_from)
        record = models.read_record(run, "--start_from")
        _check_same_task(run, record, shared)
        trained.check_goes_on(run, method.peft_method)
        source = models.source_of_run(run, record)
    else:
        source = models.resolve(shared.model, shared.fallback_model, weights=not shared.from_scratch)
    check_cell(shared.task, source, method)
    if method.positions() and not shared.max_length:
        shared.max_length = longest(kind, source, method)
    if run:
        _check_same_pooling(run, record, shared, source)
    tokenizer = models.load_run_tokenizer(run) if run else models.load_tokenizer(source)
    if shared.streaming:
        task = _stream(kind, shared, training, source, tokenizer)
        if run:
            _descend(task, run, record, shared)
        return task
    old = _old_source(shared)
    files = [data.identify(shared.data, shared.columns, split=shared.split)]
    files += [_of(old, data.identify, old.name, shared.columns)] if old else []
    read = functools.cache(partial(_rows, kind, shared, training.seed, files, old))  # at most once, and only if they are needed
    if shared.from_scratch:
        source, tokenizer = kind.from_scratch(shared, training, source, tokenizer,
                                              lambda: read().splits["train"].rows[: shared.max_train_samples])
    folder = disk.cache() / disk.key(
        [{split: file.sha256 for split, file in found.items()} for found in sum(files, [])],
        {name: value for name, value in asdict(shared).items() if name not in NOT_OF_ROWS}, training.seed,
        models.tokenizer_files(tokenizer), models.config(source).to_dict(), record.get("data"))
    entry = disk.kept(folder)
    if entry:
        task = _make(kind, shared, source, tokenizer, entry[1]["facts"])
    else:
        rows = read()
        facts = _facts_of_run(record, shared, rows.facts) if run else rows.facts
        task = _make(kind, shared, source, tokenizer, facts)
        features, counts = _encode(task, rows.splits, shared)
        disk.keep(folder, features, {"facts": facts, "report": {
            "splits": counts, **rows.replayed, "doctor": _brief(rows, counts["train"], shared)}})
    features, made = entry or disk.kept(folder)
    task.report |= {"max_length": task.max_length, **made["report"], "tokenized": {"folder": str(folder), "from_cache": bool(entry)}}
    task.report["doctor"]["details"] = doctor_command(shared, training.seed)
    _note_not_read(task, shared)
    task.train, task.dev, task.old = features["train"], features["dev"], features.get("old")
    if run:
        _descend(task, run, record, shared)
    if shared.max_tokens:
        training.num_train_epochs = shared.max_tokens / task.report["splits"]["train"]["tokens"]
    if shared.tokens_per_step:
        _plan_steps(task, shared.tokens_per_step, training)
    return task


def _stream(kind, shared, training, source, tokenizer) -> Task:
    """The task with train rows that are read while it trains. Dev rows are those of a dev file, or the first of the train rows."""
    files = streaming.files(shared.data, shared.columns, shared.split)
    read = partial(streaming.rows, [found["train"] for found in files], kind.check(shared), shared.columns, shared.on_bad_row)
    name, limit = " + ".join(found["train"].name for found in files), shared.max_eval_samples or DEV_ROWS
    beginning = list(deadline.timed(itertools.islice(read(lambda sentence: None), max(limit, 1000)), name))
    first = disk.store(row for _, row in beginning).placed([where for where, _ in beginning],
                                                            [number for i in range(len(beginning)) for number in (i, 0, 0)])
    devs = [data.read(found["dev"], kind.check(shared), shared.on_bad_row, shared.columns) for found in files if "dev" in found]
    dev = data.join(devs) if devs else data.Rows(first[:limit], f"{name} (first {len(first[:limit])} rows)", "streamed")
    task = _make(kind, shared, source, tokenizer, kind.facts(first, shared))
    if task.one is None:
        raise UserError(f"--streaming: --task {task.name} must know all rows before it begins, for their labels or to join "
                        "their texts: leave it out")
    features, splits = _encode(task, {"dev": dev}, shared)
    report = {"source": name, "sha256": "streamed", "unit": kind.UNIT, "items": "tokens", "sentences": [], "notes": [
        f"streamed, shuffled among {shared.shuffle_buffer:,} rows at a time; the counts are those of "
        + ("the run" if training.world_size == 1 else f"the first of {training.world_size} processes")]}
    task.train = streaming.Stream(read, task.one, report, shared, 0 if devs else len(dev.rows), training.seed, training.process_index,
                                  training.world_size)
    task.dev = features["dev"]
    task.report |= {"max_length": task.max_length, "splits": {"train": report, **splits}, "doctor": {
        "sentences": ["a stream is not examined for copies, leaks and personal data"], "details": doctor_command(shared, training.seed)}}
    _note_not_read(task, shared)
    return task


def _note_not_read(task: Task, shared) -> None:
    """Say which files and splits of the sources are not read."""
    left = data.not_read(shared.data, not shared.streaming, shared.split)
    task.report["notes"] = [*task.report.get("notes", []), *data.tell_not_read(left)]
    task.report["not_read"] = {"count": sum(map(len, left.values())), "names": left}


def doctor_command(shared, seed: int) -> str:
    """The command that examines the rows of this training from all sides."""
    default = args.SharedArguments()
    given = {name: value for name in args.READING if (value := getattr(shared, name)) != getattr(default, name)}
    given |= {} if shared.start_from else {"model": shared.model}  # a run may be an adapter, which is no model by itself
    given |= {"seed": seed} if seed != args.SEED else {}
    words = ["python", "scripts/doctor.py"]
    for name, value in given.items():
        words += [f"--{name}", *([] if value is True else map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def _plan_steps(task: Task, tokens: int, training) -> None:
    """How many steps of `tokens` tokens the train rows make. Raises `UserError` where a step could not hold a row."""
    lengths = batches.lengths(task.train, task.texts)
    if max(lengths) > tokens:
        raise UserError(f"--tokens_per_step {tokens}: the longest train row has {max(lengths)} tokens; raise it, or lower --max_length")
    if len(lengths) < training.world_size:
        raise UserError(f"--tokens_per_step: {len(lengths)} train rows are too few for {training.world_size} processes")
    task.steps = batches.steps_of(lengths, tokens, training.world_size)
    # What the Trainer takes a step to hold when it counts samples per second: the mean.
    training.per_device_train_batch_size = round(len(lengths) / task.steps / training.world_size)
    task.report["steps_an_epoch"] = task.steps


def _draw_share(train: data.Rows, share: float, limit: int | None, seed: int) -> None:
    """Leave `share` of the train rows, the first ones of an order drawn with `seed`: so each share is part of every larger one.

    Of the first `limit` rows, --max_train_samples, where there is one: a share of more rows than are trained on would be no smaller.
    """
    order = list(range(len(train.rows[:limit])))
    random.Random(seed).shuffle(order)
    chosen = order[: max(1, round(share * len(order)))]
    train.rows = train.rows.take(chosen)
    train.notes = [*train.notes, f"--train_fraction {share:g}: {len(chosen)} of {len(order)} train rows, drawn with seed {seed}"]


class _Rows(NamedTuple):
    splits: dict[str, data.Rows]  # "train", "dev", and "old", on which forgetting is measured, if that is asked for
    replayed: dict  # what was mixed in, for the report
    facts: dict  # what the train rows say
    read: dict[str, disk.Stored]  # the rows of the files, by split, as the doctor examines them


class _Old(NamedTuple):
    """What --replay or --measure_forgetting names, and the share of the train rows that comes from there."""

    flag: str
    name: str
    share: float


def _rows(kind, shared, seed: int, files: list[list[dict]], old: _Old | None) -> _Rows:
    splits = data.load(shared.data, kind.check(shared), shared.dev_fraction, seed, shared.on_bad_row, shared.columns, files[0],
                       shared.split)
    read, replayed = {name: split.rows for name, split in splits.items()}, {}
    for split in splits.values():
        split.rows = kind.rows(split.rows, shared)
    if old:
        found = _of(old, data.load, old.name, kind.check(shared), shared.dev_fraction, seed, shared.on_bad_row, shared.columns, files[1])
        for split in found.values():
            split.rows = kind.rows(split.rows, shared)
        replayed = _mix_in(old, found["train"], splits["train"], shared.max_train_samples, seed)
        splits |= {"old": found["dev"]}
    facts = kind.facts(splits["train"].rows, shared)
    if replayed and "labels" in facts:
        _know_old_labels(old, facts, kind.facts(splits["train"].rows + found["train"].rows, shared)["labels"], splits["train"])
    if shared.train_fraction < 1:
        _draw_share(splits["train"], shared.train_fraction, shared.max_train_samples, seed)
    return _Rows(splits, replayed, facts, read)


def _brief(rows: _Rows, trained_on: dict, shared) -> dict:
    """What the doctor says of the rows in short; `trained_on` is the report on the train rows."""
    counts, sentences = doctor.brief(rows.read["train"][: shared.max_train_samples], rows.read["dev"][: shared.max_eval_samples],
                                     trained_on.get("labels"), repeated=data.sources(shared.data)[0].weight is not None)
    return {**counts, "sentences": sentences}


def _encode(task: Task, splits: dict[str, data.Rows], shared) -> tuple[dict[str, Dataset], dict]:
    """Features and a report on the rows of each split that training needs."""
    features, report = {}, {}
    for split, limit in (("train", shared.max_train_samples), ("dev", shared.max_eval_samples), ("old", shared.max_eval_samples)):
        if found := splits.get(split):
            features[split], counts = task.encode(found.rows[:limit], found.source, shared.on_bad_row, split == "train")
            refused = list(counts.pop("refused").values())
            report[split] = {"source": found.source, "sha256": found.sha256, **counts, "bad_rows": found.skipped + refused,
                             "notes": found.notes, "files": found.files}
    return features, report


def _old_source(shared) -> _Old | None:
    if not shared.replay:
        return _Old("--measure_forgetting", shared.measure_forgetting, 0.0) if shared.measure_forgetting else None
    name, _, text = shared.replay.rpartition(":")
    share = float(text) if re.fullmatch(r"0?\.\d+", text) else 0.0
    if not name or not 0 < share < 1:
        raise UserError(f"--replay {shared.replay}: give the share of old rows after a colon, between 0 and 1, as in old.jsonl:0.2")
    return _Old("--replay", name, share)


def _of(old: _Old, function, *args):
    """What `function` returns; its complaints about --data name the old source's flag."""
    try:
        return function(*args)
    except UserError as error:
        raise UserError(str(error).replace("--data", old.flag, 1)) from error


def _mix_in(old: _Old, pool: data.Rows, train: data.Rows, limit: int | None, seed: int) -> dict:
    """Mix rows of `pool` into the `train` rows. Returns what was replayed, for the report.

    --max_train_samples, the `limit`, counts the mixture, and leaves its shares as they are.
    """
    if not old.share:
        return {}
    if pool.sha256 == train.sha256:
        raise UserError(f"--replay {old.name} holds the rows of --data, which would only stand there twice: name old or general rows")
    if limit:
        train.rows = train.rows[: max(1, round((1 - old.share) * limit))]
    wanted = round(old.share / (1 - old.share) * len(train.rows))
    if limit:
        wanted = min(wanted, limit - len(train.rows))
    drawn = pool.rows.take(random.Random(seed).sample(range(len(pool.rows)), min(wanted, len(pool.rows))))
    train.notes += [*pool.notes, f"replay: {len(drawn)} of {len(pool.rows)} rows of {old.name} added to {len(train.rows)}"
                    + (f", as there are no {wanted}" if len(drawn) < wanted else "")]
    train.skipped += [f"{old.name}, {sentence}" for sentence in pool.skipped]
    train.files += pool.files
    train.rows = train.rows + drawn
    return {"replay": {"source": pool.source, "sha256": pool.sha256, "rows": len(pool.rows), "added": len(drawn)}}


def _know_old_labels(old: _Old, facts: dict, every: dict, train: data.Rows) -> None:
    """Make the labels of `facts` `every` one that the train rows and the source of --replay have, as old dev rows are scored by all of
    them. Those without a row among the `train` rows are told: they can't be learned."""
    missing = [label for label in every if label not in facts["labels"]]
    facts["labels"] = {label: facts["labels"].get(label, 0) for label in every}
    if missing:
        train.notes.append(f"replay: {counted(len(missing), 'labels')} of {old.name} without a row among those drawn, not learned "
                           f"({', '.join(missing[:5])}{' ...' if missing[5:] else ''}): a larger share draws more")


def _check_same_task(run: Path, record: dict, shared) -> None:
    """Raise `UserError` if the run that is to be continued learned another task."""
    own = record["task"]
    if own != shared.task:
        other = ", or --model in place of --start_from to teach it another task" if (run / "config.json").is_file() else ""
        raise UserError(f"--start_from {run} was trained with --task {own}, not {shared.task}: give --task {own}{other}")


def _check_same_pooling(run: Path, record: dict, shared, source: models.Source) -> None:
    """Raise `UserError` if the head of an adapter would see another vector than it learned from; a whole model's config says which."""
    if shared.task != "classify" or (run / "config.json").is_file() or models.kind(source) != "encoder":
        return
    before, now = (models.pooling(source) if own == "auto" else own for own in (flags(record).pooling, shared.pooling))
    if before != now:
        raise UserError(f"--start_from {run} was trained with --pooling {before}, not {now}: go on in the same way")


def _facts_of_run(record: dict, shared, facts: dict) -> dict:
    """The labels of the run that is continued, which its head knows, with the counts of the new rows. Raises `UserError` for new ones."""
    if "labels" not in facts:
        return facts
    if flags(record).multi_label != shared.multi_label:
        raise UserError(f"--start_from {shared.start_from} was trained {'without' if shared.multi_label else 'with'} --multi_label: "
                        "go on in the same way")
    known = record["data"]["labels"]
    if new := [label for label in facts["labels"] if label not in known]:
        raise UserError(f"--start_from {shared.start_from}: its labels do not include {new[0]!r} of the new rows; a run goes on with the "
                        "labels it has, so train a new one on all rows")
    return facts | {"labels": {label: facts["labels"].get(label, 0) for label in known}}


def _descend(task: Task, run: Path, record: dict, shared) -> None:
    """Make `task` that of a run which goes on from `run`, and note what it reads otherwise."""
    task.lineage = [*record.get("lineage", []), _ancestor(run, record)]
    task.head_given = not (run / "config.json").is_file()
    before = flags(record)
    changed = [f"--{name} {_shown(getattr(shared, name))} (there: {_shown(getattr(before, name))})" for name in READ_ALIKE
               if getattr(shared, name) != getattr(before, name)]
    if changed:
        task.report["notes"] = [*task.report.get("notes", []), f"rows are read otherwise than in {run}: {', '.join(changed)}"]


def _shown(value) -> str:
    return "not given" if value is None else repr(value)


def _ancestor(run: Path, record: dict) -> dict:
    return {"run": str(run.absolute()), "recipe": record["recipe"], "model": record["model"]["used"], "steps": record["steps"],
            "dev_loss": record["metrics"]["dev_loss"], "train_data": record["data"]["splits"]["train"]["sha256"]}


def of_run(record: dict, tokenizer) -> Task:
    """The task of a finished run, without its data: `record` is its run.json, `tokenizer` the run's own."""
    return _make(module(record["task"]), flags(record), models.Source(**record["model"]), tokenizer, record["data"])


def flags(record: dict) -> SimpleNamespace:
    """The flags that all recipes share (args.SharedArguments), as they were in the run of this run.json; newer ones at their defaults."""
    return SimpleNamespace(**asdict(args.SharedArguments()) | record["shared_arguments"])


def without_data(shared, source: models.Source, rows: list[dict]) -> Task:
    """The task for the model `source` and what the train `rows` say, which is enough to encode rows. Raises `UserError`."""
    kind = module(shared.task)
    return _make(kind, shared, source, models.load_tokenizer(source), kind.facts(rows, shared))


def longest(kind, source: models.Source, method) -> int:
    """Tokens a row may have by default: the task's (`kind`), or what `method` (args.Method) leaves of the model's window beside itself."""
    window = models.window(source)
    return min(kind.MAX_LENGTH, max(window - method.positions(), 8)) if window else kind.MAX_LENGTH


def _make(kind, shared, source, tokenizer, facts: dict) -> Task:
    window = models.window(source)
    if shared.max_length and window and shared.max_length > window:
        raise UserError(f"--max_length {shared.max_length} exceeds the {window} tokens that {source.used} can read: lower it")
    shared.max_length = shared.max_length or min(kind.MAX_LENGTH, window or kind.MAX_LENGTH)
    task = kind.make(shared, source, tokenizer, facts)
    task.window = window
    task.config["pad_token_id"] = tokenizer.pad_token_id  # heads on top of a decoder look for the last token before the padding
    if shared.model_dropout is not None:
        found = regularize.dropouts(models.config(source))
        if not found:
            raise UserError(f"--model_dropout: {source.used} has no dropout to set: leave it out")
        task.dropout = dict.fromkeys(found, shared.model_dropout)
    task.report |= facts
    return task


def print_report(task: Task) -> None:
    """The run's first lines on the screen: the model, and what became of the rows."""
    source, report = task.source, task.report
    asked = f" (from scratch, after {source.requested})" if source.from_scratch else f" (asked for: {source.requested})"
    print(f"model: {source.used}" + (asked if source.used != source.requested else ""))
    if task.lineage:
        print("goes on from: {run} ({recipe}, {counted})".format(**task.lineage[-1], counted=counted(task.lineage[-1]["steps"], "steps")))
    if report.get("tokenized", {}).get("from_cache"):
        print(f"tokenized rows from the cache, as neither they nor what reads them has changed: {report['tokenized']['folder']}")
    for note in report.get("notes", []):
        print(f"note: {note}")
    for split, c in report["splits"].items():
        if "rows" not in c:
            print(f"{split}: {c['source']}, {c['notes'][0]}")
            continue
        print(f"{split}: {c['kept']:,} of {counted(c['rows'], c['unit'])}, {counted(c['tokens'], 'tokens')}, "
              f"{counted(c['supervised'], c['items'])} {'trained on' if split == 'train' else 'scored'} ({c['source']})")
        for sentence in c["notes"] + c["sentences"]:
            print(f"  {sentence}")
        for sentence in c["bad_rows"][:5]:
            print(f"  skipped {sentence}")
        if len(c["bad_rows"]) > 5:
            print(f"  ... {len(c['bad_rows'])} rows skipped in all; run.json lists them")
    if report["doctor"]["sentences"]:
        print("\n".join(["doctor:", *(f"  {sentence}" for sentence in report["doctor"]["sentences"]),
                         f"  details: {report['doctor']['details']}"]))
