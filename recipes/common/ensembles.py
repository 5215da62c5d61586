"""Several runs that answer together, by the mean of their probabilities. Each reads the rows as it was trained to: with its own tokenizer,
and as much of a row as its own --max_length holds. What only some of them read is decided by those.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from recipes.common import encoding, losses, tasks
from recipes.common.chat import IGNORE
from recipes.common.errors import UserError

# Flags that say what a model is asked.
ASKED_ALIKE = ("context_turns", "multi_label", "oos_label", "instruction", "source_prefix", "next_sentence")


def check(folders: list[Path], records: list[dict], tokenizers: list) -> None:
    """Raise `UserError` unless all runs do the same task with the same tokens and labels, so that their probabilities can be averaged."""
    first, record = folders[0], records[0]
    if len({path.absolute().resolve() for path in folders}) < len(folders):
        raise UserError("--run: the same run is named twice")
    for other, theirs, tokens in zip(folders[1:], records[1:], tokenizers[1:], strict=True):
        if theirs["task"] != record["task"]:
            raise UserError(f"--run {other} does --task {theirs['task']}, {first} --task {record['task']}: they can't answer together")
        # A label of a whole row is the same, whatever tokens the row is read as.
        if record["task"] != "classify" and (tokens.get_vocab() != tokenizers[0].get_vocab()
                                             or tokens.chat_template != tokenizers[0].chat_template):
            raise UserError(f"--run {other} and {first} have different tokens or chat templates: they can't answer together")
        if list(theirs["data"].get("labels", [])) != list(record["data"].get("labels", [])):
            raise UserError(f"--run {other} and {first} know different labels: they can't answer together")
        mine, own = tasks.flags(record), tasks.flags(theirs)
        for flag in ASKED_ALIKE:
            if getattr(own, flag) != getattr(mine, flag):
                raise UserError(f"--run {other} and {first} were trained with different --{flag}: they can't answer together")
        if record["task"] == "pretrain" and own.max_length != mine.max_length:
            raise UserError(f"--run {other} and {first} cut texts at different --max_length ({own.max_length}, {mine.max_length}), so they "
                            "are asked for other tokens: they can't answer together")


def load(loaders: list) -> losses.Ensemble:
    """An ensemble of the models that `loaders` load, all in memory."""
    return losses.Ensemble([load() for load in loaders])


def task_of(members: list[tasks.Task]) -> tasks.Task:
    """The task of an ensemble whose members read rows as their tasks say, for scoring alone."""
    return replace(members[0], members=members, encode=partial(_encode, members=members), collate=partial(_collate, members=members),
                   loss=partial(_loss, members=members))


def _encode(rows, name: str, on_bad_row: str = "stop", *, members: list[tasks.Task], **options):
    """The features of each row, those of the member that reads most of it, with all members' beside them ("0 input_ids"). A row that is too
    long for some of them is read by the others."""
    made, features = [member.encode(rows, name, on_bad_row, **options) for member in members], []
    every = [counts for _, counts in made]
    gone = [{*counts["left_out"], *counts["refused"]} for counts in every]
    each = [iter(own) for own, _ in made]
    for number in range(1, len(rows) + 1):
        own = [None if number in out else next(features) for features, out in zip(each, gone, strict=True)]
        longest = max((one for one in own if one), key=lambda one: len(one["input_ids"]), default=None)
        if longest:
            nothing = {"input_ids": longest["input_ids"][:1], "labels": [IGNORE]}  # to be read, and not asked for
            features.append(longest | {f"{i} {name}": value for i, one in enumerate(own) for name, value in (one or nothing).items()})
    left_out = sorted(set.intersection(*(set(counts["left_out"]) for counts in every)))
    # What became of the rows is said by the sentences of the members.
    return encoding.dataset(features), {"refused": every[0]["refused"], "left_out": left_out}


def _collate(features: list[dict], members: list[tasks.Task]) -> dict[str, torch.Tensor]:
    """The batches of all members in one, the number of the member before each name; "input_ids" are the longest of them."""
    batch = {}
    for number, member in enumerate(members):
        own = member.collate([_own(feature, number) or feature for feature in features])  # of a row that all read alike (pretrain), the row
        batch |= {f"{number} {name}": tensor for name, tensor in own.items()}
    longest = max((batch[f"{number} input_ids"] for number in range(len(members))), key=lambda ids: ids.shape[1])
    return batch | {"input_ids": longest} | {name: batch[f"0 {name}"] for name in ("bytes",) if f"0 {name}" in batch}


def _own(named: dict, number: int) -> dict:
    """What belongs to the member of this number, under its own names."""
    start = f"{number} "
    return {name.removeprefix(start): value for name, value in named.items() if name.startswith(start)}


def _loss(model: losses.Ensemble, inputs: dict, members: list[tasks.Task]) -> list[losses.Part]:
    passes = [member.loss(network, _own(inputs, number))
              for number, (member, network) in enumerate(zip(members, model.members, strict=True))]
    # A dialogue that is too long loses its oldest turns, any other row its end.
    return losses.average(passes, from_end=members[0].loss is losses.next_token)
