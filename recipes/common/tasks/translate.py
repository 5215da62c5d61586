"""A source and its target: a translation, or any other text made from a text.

Rows are {"source", "target"}; for scoring, "refs" may hold several targets. An encoder-decoder (T5, Marian) reads the source, after
`--source_prefix`, and writes the target; tokens of both are counted, in a step as in tokens a second. A
decoder-only model is asked in a dialogue of one question, `--instruction` and the source, so templates, masks and generation are those of
the chat task.
"""

from functools import partial

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from recipes.common import chat, data, encoding, evaluation, generation, losses, metrics, models, processes
from recipes.common.chat import IGNORE
from recipes.common.errors import UserError
from recipes.common.scoring import dataset_outputs, mean_loss
from recipes.common.tasks import Task
from recipes.common.tasks import chat as chat_task
from recipes.common.wording import counted

MAX_LENGTH = 256
UNIT = "pairs"
MODELS = {
    "decoder": AutoModelForCausalLM,
    "encoder": "can't write: use an encoder-decoder, or a decoder-only model (smollm2)",
    "encoder-decoder": AutoModelForSeq2SeqLM,
}
UNTUNED_SCORES = True  # a pretrained model can be asked the same
# Multilingual models that write the language of a code, which the rows do not name. M2M-100 and NLLB are the same type.
LANGUAGE_CODES = {"mbart", "m2m_100", "nllb-moe", "plbart"}
COLUMNS = {"loss": "loss", "perplexity": "perplexity", "bleu": "BLEU", "chrf": "chrF", "rougeL": "ROUGE-L"}


def check(shared):
    """A row is a source with its target."""
    return data.check_translate


def rows(rows, shared):
    """A pair is one row."""
    return rows


def facts(rows, shared) -> dict:
    """Nothing: a model needs no more than the pairs themselves."""
    return {}


def make(shared, source, tokenizer, facts) -> Task:
    """The task for this model, by its kind. Raises `UserError` for a tokenizer or chat template that can't be trained on safely."""
    if models.config(source).is_encoder_decoder:
        if shared.instruction:
            raise UserError(f"--instruction asks a decoder-only model; {source.used} is an encoder-decoder: use --source_prefix")
        return _encoder_decoder(shared, source, tokenizer)
    if shared.source_prefix:
        raise UserError(f"--source_prefix is for encoder-decoders; {source.used} is a decoder-only model: use --instruction")
    task = chat_task.make(shared, source, tokenizer, facts, turns=partial(dialogue, instruction=shared.instruction))
    task.name, task.encode = "translate", partial(_encode_dialogue, encode=task.encode)
    return task


def _encoder_decoder(shared, source, tokenizer) -> Task:
    if models.config(source).model_type in LANGUAGE_CODES:
        raise UserError(f"{source.used} writes the language that a code says, and no code is set here: use a model of one direction "
                        "(Marian), or one that is asked in words (T5)")
    if tokenizer.eos_token is None or tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {source.used} has no token that ends or pads a text: use another encoder-decoder")
    one = partial(_encode, tokenizer=tokenizer, prefix=shared.source_prefix or "", max_length=shared.max_length)
    return Task("translate", "SEQ_2_SEQ_LM", AutoModelForSeq2SeqLM, source, tokenizer, shared.max_length,
                encode=partial(encode, one=one, max_length=shared.max_length, processes=shared.preprocessing_num_workers), one=one,
                texts=("input_ids", "labels"), collate=partial(collate, pad_id=tokenizer.pad_token_id), loss=losses.same_token,
                generation=models.own_generation_config(source))


def encode(rows, name: str, on_bad_row: str = "stop", training: bool = False, *, one: encoding.One, max_length: int,
           processes: int | None = None) -> tuple[Dataset, dict]:
    """Tokenize pairs into columns input_ids (the source) and labels (the target and the token that ends it).

    A source of more than `max_length` tokens loses its end; a pair whose target is longer is left out, as a target without its end would
    teach the model not to stop. Both are counted. Raises `UserError` when nothing is left.
    """
    features, counts, left_out, _ = encoding.encode(rows, name, one, "pair", on_bad_row, processes)
    if features is None:
        raise UserError(f"{name}: every target is longer than --max_length {max_length}: raise it")
    sentences = _first_of_several(rows)
    if counts["shortened"]:
        sentences.append(f"{counted(counts['shortened'], 'source exceeds|sources exceed')} --max_length {max_length}: the end is cut off")
    if left_out:
        sentences.append(f"left out, as their target exceeds --max_length {max_length}: {counted(len(left_out), 'pairs')}")
    return features, {
        "unit": UNIT, "rows": len(rows), "kept": len(features), "left_out": left_out, "refused": {}, "items": "tokens",
        **{key: counts[key] for key in ("shortened", "tokens", "supervised")}, "sentences": sentences}


def _encode(row: dict, tokenizer, prefix: str, max_length: int) -> tuple[dict | None, dict]:
    ids, shortened = _read(prefix + row["source"], tokenizer, max_length)
    labels = tokenizer(text_target=_target(row))["input_ids"]
    if labels[-1:] != [tokenizer.eos_token_id]:
        labels.append(tokenizer.eos_token_id)
    if len(labels) > max_length:
        return None, {}
    return {"input_ids": ids, "labels": labels}, {"shortened": shortened, "tokens": len(ids) + len(labels), "supervised": len(labels)}


def _read(text: str, tokenizer, max_length: int) -> tuple[list[int], bool]:
    """Token ids of a source, and whether it lost its end. The tokenizer keeps the tokens that it puts around a text."""
    ids = tokenizer(text)["input_ids"]
    if len(ids) <= max_length:
        return ids, False
    return tokenizer(text, truncation=True, max_length=max_length)["input_ids"], True


def _target(row: dict) -> str:
    return row["target"] if "target" in row else row["refs"][0]


def _first_of_several(rows: list[dict]) -> list[str]:
    several = sum("target" not in row and len(row["refs"]) > 1 for row in rows)
    return [f'{counted(several, "pair has|pairs have")} several "refs" and no "target": the loss is over the first one'] if several else []


def collate(features: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (batch, longest source), labels (batch, longest target), all padded on the right."""
    batch = chat.pad([{"input_ids": f["input_ids"], "labels": f["input_ids"]} for f in features], pad_id)
    longest = max(len(f["labels"]) for f in features)
    batch["labels"] = torch.tensor([f["labels"] + [IGNORE] * (longest - len(f["labels"])) for f in features])
    return batch


def dialogue(row: dict, instruction: str | None) -> list[dict]:
    """The question that a decoder-only model is asked, and the answer that it learns."""
    asked = f"{instruction}\n{row['source']}" if instruction else row["source"]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": _target(row)}]


def _encode_dialogue(rows, name, on_bad_row="stop", training=False, *, encode):
    features, counts = encode(rows, name, on_bad_row, training)
    sentences = _first_of_several(rows) + [sentence.replace("dialogue", "pair") for sentence in counts["sentences"]]
    return features, {**counts, "unit": UNIT, "sentences": sentences}


def evaluate(candidates: dict, task: Task, rows: list[dict], record: dict, options) -> dict:
    """Loss over the target's tokens, and the target that the model writes, greedily or with --num_beams, against all references.

    Raises `UserError` for more tokens than an encoder-decoder's decoder has positions for.
    """
    read, kept = evaluation.encoded(candidates, rows, record["shared_arguments"]["on_bad_row"]), {}
    for sentence in [*next(iter(read.values()))[1]["refused"].values(), *evaluation.sentences(read)]:
        print(f"note: {sentence}")
    for name, (_, counts) in read.items():
        gone = set(counts["left_out"]) | set(counts["refused"])
        kept[name] = [i for i in range(len(rows)) if i + 1 not in gone]
    references = [row["refs"] if "refs" in row else [row["target"]] for row in rows]
    languages = [metrics.detect_language(" ".join(refs)) for refs in references]
    scored, texts, notes, losses = [], {}, [], {}
    for name, candidate in candidates.items():
        model = candidate.load()
        sums = [sums for sums, in dataset_outputs(model, candidate.task, read[name][0], f"Loss of {name}")]
        losses[name] = {i: pair.tolist() for i, pair in zip(kept[name], sums, strict=True)}
        texts[name], cut = write(name, model, candidate.task, rows, record, options)
        scores = metrics.score_replies(texts[name], references, languages)
        signature = scores.pop("signature")
        for language, score in scores.items():
            part = [pair for i, pair in zip(kept[name], sums, strict=True) if language in ("all", languages[i])]
            score |= mean_loss(np.array(part)) if part else {"loss": np.nan, "perplexity": np.nan}
            scored.append({"language": language, "model": name, "count": score["n"], "empty": score["empty"],
                           "values": [score[key] for key in COLUMNS]})
        if cut:
            notes.append(f"{name}: {cut} of {len(rows)} targets did not end within {options.max_new_tokens} tokens and were cut")
    samples = [[("source", rows[i]["source"]), ("reference", references[i][0]), *((name, written[i]) for name, written in texts.items())]
               for i in evaluation.reported(len(rows), options)]
    predictions = [{"id": row.get("id", i), "row": i, "language": languages[i], "source": row["source"], "references": references[i],
                    **{name: written[i] for name, written in texts.items()}} for i, row in enumerate(rows)]
    keys = [{"language": language, "target_length": metrics.length_class(refs[0])}
            for language, refs in zip(languages, references, strict=True)]
    slices = evaluation.slices(keys, chat_task.SLICED.values(), chat_task.sliced(texts, references, languages))
    how = "greedy" if options.num_beams == 1 else f"{options.num_beams} beams"
    if options.length_penalty != 1:
        how += f", length penalty {options.length_penalty:g}"
    if options.no_repeat_ngram_size:
        how += f", no {options.no_repeat_ngram_size} tokens twice"
    return evaluation.result(COLUMNS.values(), scored, UNIT, len(rows), notes=notes, samples=samples, predictions=predictions,
                             losses=losses, slices=slices, signature=f"{signature}; {how}, at most {options.max_new_tokens} new tokens")


def write(name, model, task, rows, record, options) -> tuple[list[str], int]:
    """A model's own target for each row, and how many were cut at --max_new_tokens. Sources that don't fit give an empty target."""
    flags = record["shared_arguments"]
    search = {"length_penalty": options.length_penalty, "no_repeat_ngram_size": options.no_repeat_ngram_size}
    if task.peft_type == "CAUSAL_LM":
        limits = generation.limits(model, task, options.max_new_tokens)
        prompts = generation.side_by_side([[chat.prompt(dialogue(row, flags["instruction"])[:1], task.tokenizer, limit) for row in rows]
                                           for limit in limits])
        fitting = [ids for ids in prompts if ids is not None]
        if len(fitting) < len(rows):
            print(f"note: {name}: {counted(len(rows) - len(fitting), 'source exceeds|sources exceed')} the {min(limits)} tokens that "
                  "--max_length leaves; the target is empty")
        texts, cut = processes.divided(lambda own: generation.replies(
            model, task.tokenizer, own, options.max_new_tokens, options.batch_size, f"Targets of {name}", options.num_beams, **search),
            fitting)
        texts = iter(texts)
        return [next(texts) if ids is not None else "" for ids in prompts], cut
    if generation.room(model, options.max_new_tokens) < 0:
        raise UserError(f"--max_new_tokens {options.max_new_tokens} exceeds what the decoder of {name} has positions for: lower it by "
                        f"{-generation.room(model, options.max_new_tokens)} or more")
    each = []
    for own in task.readers():
        sources, shortened = zip(*(_read((flags["source_prefix"] or "") + row["source"], own.tokenizer, own.max_length) for row in rows),
                                 strict=True)
        each.append(list(sources))
        if any(shortened):
            print(f"note: {name} reads {counted(sum(shortened), 'sources')} without the end, which exceeds --max_length {own.max_length}")
    sources = generation.side_by_side(each)
    return processes.divided(lambda own: generation.write(
        model, task.tokenizer, own, generation.right_pad, options.max_new_tokens, options.batch_size, options.num_beams,
        f"Targets of {name}", **search), sources)
