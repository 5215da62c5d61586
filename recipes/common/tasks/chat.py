"""Dialogues: the model learns what the assistant says. Loss on each assistant turn and on the token that ends it (common/chat.py)."""

import math
from collections import Counter
from functools import partial
from operator import itemgetter

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM

from recipes.common import chat, data, encoding, evaluation, generation, losses, metrics, models, processes
from recipes.common.errors import UserError
from recipes.common.scoring import dataset_outputs, mean_loss
from recipes.common.tasks import Task
from recipes.common.wording import counted

MAX_LENGTH = 768
UNIT = "dialogues"
MODELS = {
    "decoder": AutoModelForCausalLM,
    "encoder": "can't write: use a decoder-only model (smollm2)",
    "encoder-decoder": "reads one text and writes another, while a dialogue is one text: use a decoder-only model (smollm2), or --task "
                       "translate for single questions",
}
UNTUNED_SCORES = True  # a pretrained model can be asked the same
COLUMNS = {"loss": "loss", "perplexity": "perplexity", "bleu": "BLEU", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
           "chrf": "chrF", "distinct1": "distinct-1", "distinct2": "distinct-2"}
SLICED = {"bleu": "BLEU", "rougeL": "ROUGE-L", "chrf": "chrF"}  # what is scored of each part of the replies


def check(shared):
    """A row is a dialogue."""
    return data.check_dialogue


def rows(rows, shared):
    """A dialogue is one row, whatever its number of turns."""
    return rows


def facts(rows, shared) -> dict:
    """The most frequent system turn, which scripts/chat.py opens a conversation with."""
    systems = Counter(row["messages"][0]["content"] for row in rows if row["messages"][0]["role"] == "system")
    return {"system": systems.most_common(1)[0][0] if systems else None}


def make(shared, source, tokenizer, facts, turns=itemgetter("messages")) -> Task:
    """The task for this model. Raises `UserError` for a tokenizer or chat template that can't be trained on safely."""
    note = chat.prepare(tokenizer)
    one = partial(_encode, tokenizer=tokenizer, max_length=shared.max_length, turns=turns)
    return Task("chat", "CAUSAL_LM", AutoModelForCausalLM, source, tokenizer, shared.max_length,
                encode=partial(encode, one=one, max_length=shared.max_length, processes=shared.preprocessing_num_workers), one=one,
                collate=partial(chat.pad, pad_id=tokenizer.pad_token_id), loss=losses.next_token,
                generation=models.generation_config(tokenizer), report={"notes": [note] if note else []})


def encode(rows, name: str, on_bad_row: str = "stop", training: bool = False, *, one: encoding.One, max_length: int,
           processes: int | None = None) -> tuple[Dataset, dict]:
    """Tokenize dialogues into columns input_ids, labels; counts what was shortened or left out. Raises `UserError`.

    One that the model's chat template refuses (no system turn, strict alternation) is a bad row, for this model.
    """
    features, counts, left_out, refused = encoding.encode(rows, name, one, "dialogue", on_bad_row, processes)
    if features is None and len(refused) < len(rows):
        raise UserError(f"{name}: no dialogue has a supervised token within --max_length {max_length}; raise --max_length")
    if features is None:
        raise UserError(f"{name}: the model's chat template refuses every dialogue; {refused[1]}")
    sentences = []
    if counts["shortened"]:
        sentences.append(f"{counted(counts['shortened'], 'dialogue exceeds|dialogues exceed')} --max_length {max_length}: "
                         f"{counted(counts['turns_dropped'], 'oldest turns')} dropped")
    if left_out:
        sentences.append("left out, as even the last question with its answer exceeds --max_length or no turn is trained on: "
                         f"{counted(len(left_out), 'dialogues')} ({_some(rows, left_out)})")
    return features, {
        "unit": UNIT, "rows": len(rows), "kept": len(features), "left_out": left_out, "refused": refused, "items": "tokens",
        **{key: counts[key] for key in ("shortened", "turns_dropped", "tokens", "supervised")}, "sentences": sentences}


def _encode(row: dict, tokenizer, max_length: int, turns) -> tuple[dict | None, dict]:
    """`turns`: a row -> its dialogue."""
    try:
        encoded = chat.encode(turns(row), tokenizer, max_length)
    except chat.TemplateError as error:
        raise encoding.Refused(str(error), "--on_bad_row skip leaves such dialogues out") from error
    if encoded is None:
        return None, {}
    predicted = encoded.labels[1:]  # nothing predicts the first
    return {"input_ids": encoded.input_ids, "labels": encoded.labels}, {
        "shortened": encoded.dropped_turns > 0, "turns_dropped": encoded.dropped_turns, "tokens": len(encoded.input_ids),
        "supervised": len(predicted) - predicted.count(chat.IGNORE)}


def evaluate(candidates: dict, task: Task, rows: list[dict], record: dict, options) -> dict:
    """Loss over the reference's tokens, and the reply to each assistant turn given its true history, compared with the reference.

    `candidates` is name -> evaluation.Candidate. Raises `UserError` if the window leaves no room for a reply.
    """
    read = evaluation.encoded(candidates, rows, record["shared_arguments"]["on_bad_row"])
    refused = next(iter(read.values()))[1]["refused"]  # by the chat template, which all have
    for sentence in refused.values():
        print(f"skipped {sentence}")
    numbers = [number for number in range(1, len(rows) + 1) if number not in refused]
    rows, kept = [rows[number - 1] for number in numbers], {}
    for name, (_, counts) in read.items():
        kept[name] = [i for i, n in enumerate(numbers) if n not in set(counts["left_out"])]
    results = {name: _answer(name, candidate.load(), candidate.task, rows, read[name][0], options)
               for name, candidate in candidates.items()}
    languages = [metrics.language_of(row, " ".join(m["content"] for m in row["messages"] if m["role"] != "system")) for row in rows]
    turns = [(r, t) for r, t, _ in next(iter(results.values()))["replies"]]
    references = [rows[r]["messages"][t]["content"] for r, t in turns]
    scored, notes = [], []
    for name, result in results.items():
        scores = metrics.score_replies([text for _, _, text in result["replies"]], references, [languages[r] for r, _ in turns])
        signature = scores.pop("signature")
        for language, score in scores.items():
            part = [sums for r, sums in zip(kept[name], result["sums"], strict=True) if language in ("all", languages[r])]
            score |= mean_loss(np.array(part)) if part else {"loss": math.nan, "perplexity": math.nan}
            scored.append({"language": language, "model": name, "count": score["n"], "empty": score["empty"],
                           "values": [score[key] for key in COLUMNS]})
        if result["cut"]:
            notes.append(f"{name}: {result['cut']} of {len(turns)} replies did not end within {options.max_new_tokens} tokens and were cut")
        if result["too_long"]:
            notes.append(f"{name}: {counted(result['too_long'], 'question exceeds|questions exceed')} the {result['limit']} tokens that "
                         "the run's --max_length and the model's window leave; the reply counts as empty")
    texts = {name: [text for _, _, text in result["replies"]] for name, result in results.items()}
    samples = [[*((m["role"], m["content"]) for m in rows[turns[i][0]]["messages"][: turns[i][1]][-1:]), ("reference", references[i]),
                *((name, replies[i]) for name, replies in texts.items())] for i in evaluation.reported(len(turns), options)]
    losses = {name: {numbers[r] - 1: sums.tolist() for r, sums in zip(kept[name], result["sums"], strict=True)}
              for name, result in results.items()}
    predictions = [{"id": rows[r].get("id", r), "row": numbers[r] - 1, "turn": t, "language": languages[r], "reference": references[i],
                    **{name: replies[i] for name, replies in texts.items()}} for i, (r, t) in enumerate(turns)]
    keys = [_keys(rows[r]["messages"], t) | {"language": languages[r], "reply_length": metrics.length_class(references[i])}
            for i, (r, t) in enumerate(turns)]
    slices = evaluation.slices(keys, SLICED.values(), sliced(texts, references, [languages[r] for r, _ in turns]))
    return evaluation.result(COLUMNS.values(), scored, "replies", len(rows), notes=notes, samples=samples,
                             predictions=predictions, losses=losses, slices=slices,
                             signature=f"{signature}; greedy, at most {options.max_new_tokens} new tokens")


def sliced(texts: dict[str, list[str]], references, languages: list[str]) -> dict:
    """Name of a model -> the scorer of parts of its texts that evaluation.slices wants."""
    scorers = {name: metrics.part_scorer(replies, references, languages) for name, replies in texts.items()}
    return {name: lambda at, score=score: [score(at)[key] for key in SLICED] for name, score in scorers.items()}


def _keys(messages: list[dict], turn: int) -> dict:
    """What the reply `turn` answers to: the annotation of the customer's last turn, and how many replies came before."""
    asked = next((m for m in reversed(messages[:turn]) if m["role"] == "user"), {})
    number = sum(m["role"] == "assistant" for m in messages[: turn + 1])
    return {key: asked[key] for key in ("intent", "sentiment") if key in asked} | {"turn": str(number) if number < 5 else "5+"}


def _answer(name, model, task, rows, features, options) -> dict:
    """A model's loss on each of the features, and its reply to each assistant turn of the rows."""
    sums = [sums for sums, in dataset_outputs(model, task, features, f"Loss of {name}")]
    limit, prompts = asked(model, task, rows, options.max_new_tokens)
    fitting = [p for _, _, p in prompts if p is not None]
    texts, cut = processes.divided(lambda own: generation.replies(model, task.tokenizer, own, options.max_new_tokens, options.batch_size,
                                                                  f"Replies of {name}"), fitting)
    texts = iter(texts)
    return {"sums": sums, "cut": cut, "limit": limit, "too_long": len(prompts) - len(fitting),
            "replies": [(r, t, next(texts) if p is not None else "") for r, t, p in prompts]}


def asked(model, task, rows, max_new_tokens: int) -> tuple[int, list[tuple]]:
    """(the most tokens of a prompt; (row, turn, prompt) for each assistant turn, as in generation.prompts_for). Of an ensemble, the least
    of the members' limits, and a prompt is a tuple of their own."""
    limits = generation.limits(model, task, max_new_tokens)
    each = [generation.prompts_for(rows, task.tokenizer, limit) for limit in limits]
    prompts = generation.side_by_side([[prompt for _, _, prompt in own] for own in each])
    return min(limits), [(r, t, prompt) for (r, t, _), prompt in zip(each[0], prompts, strict=True)]


def _some(rows, numbers: list[int]) -> str:
    return ", ".join(encoding.place(rows, n, named=False) or f"row {n}" for n in numbers[:10]) + (", ..." if len(numbers) > 10 else "")
