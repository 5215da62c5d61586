"""Dev rows answered while training (--eval_generate_rows), so that the best checkpoint can be the one that writes best.

What is asked comes from the features themselves: of a dialogue, everything before a supervised run of tokens is the prompt and the run is
the reference; of an encoder-decoder's row, the source and the target. Answers are greedy, so no random number is drawn and the training
goes on as it would have. A rank of several processes answers its share; all ranks get the same scores.
"""

import time
from itertools import groupby

import torch
from accelerate.utils import gather_object

from recipes.common import generation, losses, metrics
from recipes.common.chat import IGNORE
from recipes.common.wording import counted

SCORES = ("bleu", "rougeL", "chrf")
BATCH = 16  # answers written at a time


def questions(rows, tokenizer, wanted: int, encoder_decoder: bool) -> list[tuple[list[int], str]]:
    """(prompt, reference) of up to `wanted` answers, evenly spread over `rows`, the features of the dev split."""
    found = []
    for i in _spread(len(rows), wanted):
        ids, labels = rows[i]["input_ids"], rows[i]["labels"]
        for start, end in [(0, len(labels))] if encoder_decoder else _runs(labels):
            found.append((ids if encoder_decoder else ids[:start], tokenizer.decode(labels[start:end], skip_special_tokens=True).strip()))
    return [found[i] for i in _spread(len(found), wanted)]


def _runs(labels: list[int]) -> list[tuple[int, int]]:
    """[start, end) of each run of supervised tokens; one that begins the row has no prompt, and is left out."""
    runs, at = [], 0
    for supervised, run in groupby(labels, key=lambda label: label != IGNORE):
        end = at + len(list(run))
        if supervised and at:
            runs.append((at, end))
        at = end
    return runs


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` different numbers below `count`, evenly spread."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def score(model, tokenizer, asked: list[tuple[list[int], str]], max_new_tokens: int, seconds: float, rank: int = 0,
          processes: int = 1) -> dict[str, float]:
    """Corpus BLEU, ROUGE-L and chrF (0-100) of greedy answers to `asked` against the references.

    No further batch is begun once `seconds` have passed. Each batch is spread over all of `asked`, so a cut leaves no part of the data
    out; how many were answered is printed, and the scores are those of the answered ones.
    """
    encoder_decoder = losses.network(model).config.is_encoder_decoder
    room = generation.room(model, max_new_tokens)
    fitting = asked if encoder_decoder else [question for question in asked if len(question[0]) <= room]
    own = fitting[rank::processes]
    batches = -(-len(own) // BATCH)
    answers, begun = [], time.monotonic()
    for number in range(batches):
        if number and time.monotonic() - begun > seconds:
            break
        batch = own[number::batches]
        texts, _ = _write(model, tokenizer, [prompt for prompt, _ in batch], max_new_tokens, encoder_decoder)
        answers += [(text, reference) for text, (_, reference) in zip(texts, batch, strict=True)]
    answers = gather_object(answers)
    if rank == 0 and len(answers) < len(asked):
        long = len(asked) - len(fitting)
        why = [f"{counted(long, 'prompt leaves|prompts leave')} no room for {max_new_tokens} more tokens"] * bool(long)
        why += [f"the others would have taken more than --eval_generate_seconds {seconds:g}"] * (len(answers) < len(fitting))
        print(f"note: {len(answers)} of {len(asked)} dev answers written and scored: {'; '.join(why)}")
    if not answers:
        return dict.fromkeys(SCORES, 0.0)
    # In one order, whatever the number of processes: sums of floating-point numbers depend on it.
    texts, references = zip(*sorted(answers), strict=True)
    scores = metrics.score_replies(list(texts), list(references))["all"]
    return {name: scores[name] for name in SCORES}


@torch.inference_mode()
def _write(model, tokenizer, prompts, max_new_tokens: int, encoder_decoder: bool) -> tuple[list[str], int]:
    if encoder_decoder:
        return generation.write(model, tokenizer, prompts, generation.right_pad, max_new_tokens, BATCH, 1, "")
    return generation.replies(model, tokenizer, prompts, max_new_tokens, BATCH, "")
