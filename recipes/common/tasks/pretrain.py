"""Text: a decoder-only model learns to write it on, an encoder to fill in its words. Of domain text, continued pretraining; with
`--from_scratch`, the whole of it.

Rows are {"text"}, or dialogues, whose turns become the lines of a text. Decoder-only models predict every token once: texts are joined,
each with the token that ends it, and cut into blocks that share one token with the next. Encoders are asked for 15 % of the words, other
ones in each epoch (Devlin et al., 2018, arXiv:1810.04805; whole words as in the authors' later code); a Chinese character counts as a
word. `--next_sentence` adds BERT's second task.
"""

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    GenerationConfig,
    TrainerCallback,
)

from recipes.common import chat, data, disk, encoding, evaluation, generation, losses, metrics, models, processes, scratch
from recipes.common.chat import IGNORE
from recipes.common.errors import UserError
from recipes.common.scoring import dataset_outputs, mean_loss
from recipes.common.tasks import Task
from recipes.common.wording import counted

MAX_LENGTH = 512
UNIT = "texts"
MODELS = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForMaskedLM,
    "encoder-decoder": "learns text by filling in spans, which is not offered: use a decoder-only model or an encoder",
}
UNTUNED_SCORES = True  # a pretrained model can be asked the same
# The token that ended a text when the model was pretrained, where its tokenizer has it: a chat model's own end is that of a turn.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
MASKED = 0.15  # share of the words that an encoder is asked for
FIXED = 0  # seed of what must not differ between evaluations, whatever --seed: the words drawn of dev rows, the pairs of sentences
BEGINNING = 24  # most tokens of a text that a sample gives the model to write on
COLUMNS = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits/byte"}
_SENTENCE_ENDS = re.compile(r"(?<=[。！？])(?![。！？”’」』])|(?<=[.!?])(?=\s)|(?<=\n)")


def check(shared):
    """A row is a text, or a dialogue."""
    return _check


def _check(row: dict) -> str | None:
    return data.check_turns(row) if "messages" in row else data.check_pretrain(row)


def rows(rows, shared) -> disk.Stored:
    """{"text", ...} of each row; of a dialogue, a line for each turn."""
    return disk.expanded(rows, lambda row: [
        {"text": "\n".join(m["content"] for m in row["messages"]), **{key: row[key] for key in ("id", "language") if key in row}}
        if "messages" in row else row])


def facts(rows, shared) -> dict:
    """Nothing: a model needs no more than the texts themselves."""
    return {}


def from_scratch(shared, training, source, tokenizer, rows) -> tuple[models.Source, object]:
    """The model that --from_scratch starts from, with its tokenizer; `rows` gives the train rows. Raises `UserError`."""
    start = scratch.start(shared, training, source, tokenizer, _auto_class(shared, source), rows)
    return start, models.load_tokenizer(start)


def make(shared, source, tokenizer, facts) -> Task:
    """The task for this model, by its kind. Raises `UserError`."""
    auto_class = _auto_class(shared, source)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {type(tokenizer).__name__} does not say which characters a token stands for: use a model with a "
                        "fast tokenizer (tokenizer.json)")
    return (_causal if auto_class is AutoModelForCausalLM else _masked)(shared, source, tokenizer, auto_class)


def _auto_class(shared, source):
    """Which of transformers' classes learns this. By the model's kind, as the classes load what they can't train without complaint."""
    if not shared.next_sentence:
        return MODELS[models.kind(source)]
    if type(models.config(source)) not in MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING:
        raise UserError(f"--next_sentence: {source.used} has no head for it, as BERT has: leave it out")
    return AutoModelForPreTraining


# ----------------------------------------------------------------------------------------------------- decoder-only models


def _causal(shared, source, tokenizer, auto_class) -> Task:
    _, end = ends(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(end)
    stops = sorted({end, tokenizer.eos_token_id} - {None})  # the Trainer would add the tokenizer's own by itself, and say so at length
    return Task("pretrain", "CAUSAL_LM", auto_class, source, tokenizer, shared.max_length,
                encode=partial(encode_blocks, tokenizer=tokenizer, max_length=shared.max_length,
                               processes=shared.preprocessing_num_workers),
                collate=partial(collate_blocks, pad_id=tokenizer.pad_token_id), loss=losses.next_token,
                generation=GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id))


def ends(tokenizer) -> tuple[int | None, int]:
    """(the token that the tokenizer puts before a text, if it does; the token that ends a text). Raises `UserError` if none does."""
    begin = tokenizer.bos_token_id if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    end = next((token for token in (*END_OF_TEXT, tokenizer.eos_token) if token in tokenizer.get_vocab()), None)
    if end is None:
        raise UserError("the tokenizer has no end-of-text token to join texts with: use a generative language model")
    return begin, tokenizer.convert_tokens_to_ids(end)


def encode_blocks(rows, name: str, on_bad_row: str = "stop", training: bool = False, *, tokenizer, max_length: int,
                  processes: int | None = None) -> tuple[Dataset, dict]:
    """Join texts and cut them into blocks: columns input_ids, labels and the bytes of UTF-8 that a block predicts.

    Each text is followed by the token that ends it. A block begins with the last token of the one before, which is read there and not
    predicted again; the first begins with the token that stands before a text, or else ends one. So each token is predicted once, given
    what stands before it in its block, be it of another text. The last block is as short as it must be.
    """
    begin, end = ends(tokenizer)
    texts, counts, _, _ = encoding.encode(rows, name, partial(_whole, tokenizer=tokenizer, begin=begin, end=end), "text", on_bad_row,
                                          processes)
    blocks = encoding.dataset(_blocks(texts, begin, end, max_length))
    return blocks, {
        "unit": UNIT, "rows": len(rows), "kept": len(rows), "left_out": [], "refused": {}, "items": "tokens", "shortened": 0,
        "tokens": counts["tokens"] + (begin is None), "supervised": counts["supervised"], "bytes": counts["bytes"], "blocks": len(blocks),
        "sentences": [f"joined into {counted(len(blocks), 'blocks')} of {max_length} tokens, {counts['bytes']:,} bytes of text"]}


def _whole(row: dict, tokenizer, begin: int | None, end: int) -> tuple[dict, dict]:
    """A text's tokens, the one that ends it included, and the bytes of each."""
    [(text, tokens, offsets, _)] = _tokenized([row["text"]], tokenizer)
    of_tokens, size = token_bytes(text, offsets), len(text.encode())
    before = [] if begin is None else [begin]
    return ({"tokens": [*before, *tokens, end], "sizes": [0] * len(before) + [*of_tokens, size - sum(of_tokens)]},
            {"tokens": len(before) + len(tokens) + 1, "supervised": len(tokens) + 1, "bytes": size})


def _blocks(texts, begin: int | None, end: int, max_length: int):
    ids = [end] if begin is None else []  # nothing stands before the first text otherwise
    labels, sizes = [IGNORE] * len(ids), [0] * len(ids)

    def block(start):
        cut = slice(start, start + max_length)
        return {"input_ids": ids[cut], "labels": labels[cut], "bytes": sum(sizes[cut][1:])}

    for text in texts:
        ids += text["tokens"]
        labels += text["tokens"] if begin is None else [IGNORE, *text["tokens"][1:]]  # begin is read, not written
        sizes += text["sizes"]
        starts = range(0, len(ids) - max_length + 1, max_length - 1)
        yield from map(block, starts)
        for part in (ids, labels, sizes):
            del part[: len(starts) * (max_length - 1)]
    if len(ids) > 1:
        yield block(0)


def collate_blocks(features: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (batch, longest), bytes (batch,)."""
    return chat.pad(features, pad_id) | {"bytes": torch.tensor([feature["bytes"] for feature in features])}


def _tokenized(texts: list[str], tokenizer):
    """(text, its token ids, the characters and the word that each token belongs to) of each text, without special tokens."""
    if not texts:  # of which a tokenizer makes nothing
        return ()
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return zip(texts, out["input_ids"], out["offset_mapping"], map(out.word_ids, range(len(texts))), strict=True)


def token_bytes(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """The bytes of UTF-8 that each token adds to the text before it. What no token stands for (a blank) goes to the next one, and of
    tokens that share a character (bytes of it), the first one gets it all."""
    before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    reached = np.maximum.accumulate(before[[end for _, end in offsets]]) if offsets else np.array([], dtype=int)
    return np.diff(reached, prepend=0).tolist()


# ---------------------------------------------------------------------------------------------------------------- encoders


class Epoch(TrainerCallback):
    """Tells the collator, which draws other words in each epoch, the seed and the epoch; in memory that its worker processes see."""

    def __init__(self):
        self.now = torch.zeros(2, dtype=torch.long).share_memory_()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.now.copy_(torch.tensor([args.seed, int(state.epoch)]))


def _masked(shared, source, tokenizer, auto_class) -> Task:
    for name in ("cls_token", "sep_token", "mask_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the tokenizer of {source.used} has no {name}, which masked words need: use another encoder")
    epoch, outputs = Epoch(), {}
    ordinary = np.array(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    draw = partial(masked, mask_id=tokenizer.mask_token_id, ordinary=ordinary)
    if shared.next_sentence:
        outputs = {"outputs": lambda parts: (_told(parts[1]),), "metrics": lambda told, labels: next_sentence_accuracy(told)}
    return Task("pretrain", "FEATURE_EXTRACTION", auto_class, source, tokenizer, shared.max_length,
                encode=partial(encode_masked, tokenizer=tokenizer, max_length=shared.max_length, next_sentence=shared.next_sentence,
                               draw=draw, processes=shared.preprocessing_num_workers),
                collate=partial(collate_masked, pad_id=tokenizer.pad_token_id, epoch=epoch.now, draw=draw), callbacks=[epoch],
                loss=losses.masked_and_next_sentence if shared.next_sentence else losses.same_token, **outputs)


def encode_masked(rows, name: str, on_bad_row: str = "stop", training: bool = False, *, tokenizer, max_length: int,
                  next_sentence: bool, draw, processes: int | None = None) -> tuple[Dataset, dict]:
    """Cut texts into rows that fit: columns input_ids, words (which word a token belongs to, -1 for what is never asked for), sizes (bytes
    of each token) and row (its number); for pairs token_type_ids and next_sentence too. Without `training`, the words to ask for are drawn
    here, once: input_ids, labels and bytes, as `masked` makes them.

    A text of more than `max_length` tokens becomes several rows, cut between words, and the short last one is kept. With `next_sentence`
    a row is a pair. A word that the tokenizer does not know is not asked for, as nothing could be learned but not to know it; a row of such
    words alone is left out. Raises `UserError`.
    """
    room, counts = max_length - (3 if next_sentence else 2), Counter()
    one = partial(_document, tokenizer=tokenizer, room=room // 2 if next_sentence else room, split=next_sentence)
    documents, _, left_out, _ = encoding.encode(rows, name, one, "text", on_bad_row, processes)

    def known():
        made = _pairs(documents, tokenizer, room) if next_sentence else (
            _feature(tokenizer, piece) for document in documents for piece in _pieces(document))
        for feature in made:
            tokens, unknown = len(feature["input_ids"]), feature["input_ids"].count(tokenizer.unk_token_id)
            counts.update(read=tokens, unknown=unknown)
            if max(feature["words"]) < 0:
                counts["strange"] += 1
                continue
            feature["row"] = counts["rows"]
            counts.update(rows=1, tokens=tokens, drawn=_wanted(feature["words"]), bytes=sum(feature["sizes"]))
            counts["pair", feature.get("next_sentence")] += 1
            yield feature if training else draw(feature, (FIXED, FIXED, feature["row"]))

    features = encoding.dataset(known()) if documents else None
    if features is None:
        raise UserError(f"{name}: the tokenizer knows no word of the texts")
    sentences = [f"cut into {counted(counts['rows'], 'rows')} of at most {max_length} tokens",
                 f"{counted(counts['drawn'], 'word is|words are')} asked for, "
                 + ("in each epoch others" if training else "the same in every evaluation")]
    if left_out:
        sentences.append(f"left out, as the tokenizer finds no word: {counted(len(left_out), 'texts')}")
    if counts["unknown"]:
        strange = counted(counts["strange"], "row of nothing else is|rows of nothing else are")
        sentences.append(f"{counts['unknown']:,} of {counts['read']:,} tokens are unknown to the tokenizer ({tokenizer.unk_token}): they "
                         "are never asked for"
                         + (f", and {strange} left out" if counts["strange"] else ""))
    if next_sentence:
        following, strangers, alone = (counts["pair", answer] for answer in (0, 1, IGNORE))
        if training and not (following and strangers):
            raise UserError(f"{name}: --next_sentence needs several texts, and several sentences in a text: leave it out")
        sentences.append(f"pairs: {following} of sentences that follow each other, {strangers} of different texts"
                         + (f"; {counted(alone, 'rows')} of a single text without a question" if alone else ""))
    return features, {
        "unit": UNIT, "rows": len(rows), "kept": len(rows) - len(left_out), "left_out": left_out, "refused": {}, "items": "words",
        "shortened": 0, "tokens": counts["tokens"], "unknown": counts["unknown"], "supervised": counts["drawn"], "bytes": counts["bytes"],
        "blocks": counts["rows"], "sentences": sentences}


def _document(row: dict, tokenizer, room: int, split: bool) -> tuple[dict | None, dict]:
    """The words of a text in pieces of at most `room` tokens, flat: tokens, the bytes of each, tokens of each word, words of each piece.
    `split`: no piece is of more than one sentence."""
    parts = sentences_of(row["text"]) if split else [row["text"]]
    pieces = [piece for part in _tokenized(parts, tokenizer) for piece in _cut(whole_words(*part), room)]
    words = [word for piece in pieces for word in piece]
    return {"tokens": [token for word in words for token, _ in word], "sizes": [size for word in words for _, size in word],
            "words": [*map(len, words)], "pieces": [*map(len, pieces)]} if pieces else None, {}


def _pieces(document: dict) -> list[list[list[tuple[int, int]]]]:
    """The pieces of a text that `_document` laid flat, each a list of words as `whole_words` has them."""
    tokens = zip(document["tokens"], document["sizes"], strict=True)
    words = iter([list(islice(tokens, n)) for n in document["words"]])
    return [list(islice(words, n)) for n in document["pieces"]]


def whole_words(text: str, ids: list[int], offsets: list[tuple[int, int]], word_ids: list[int]) -> list[list[tuple[int, int]]]:
    """The words of a text, each a list of its tokens: (id, bytes). A word is what the tokenizer cuts a text into before it cuts further;
    a Chinese character, which stands without blanks around it, is always one, as BERT's tokenizers have it. A blank that is a token goes
    with the word behind it."""
    words, blanks, last = [], [], None
    for token, size, (start, end), word in zip(ids, token_bytes(text, offsets), offsets, word_ids, strict=True):
        visible = text[start:end].strip()
        if not visible:
            blanks.append((token, size))
            continue
        place = (word, start if metrics.unspaced(visible[0]) else None)
        if place != last or blanks:
            words.append(blanks)
            blanks = []
        words[-1].append((token, size))
        last = place
    return [*words, blanks] if blanks else words


def _cut(words: list[list], room: int):
    """Words in groups of at most `room` tokens; a word of more is cut itself."""
    group, length = [], 0
    for word in (whole[i: i + room] for whole in words for i in range(0, len(whole), room)):
        if length + len(word) > room:
            yield group
            group, length = [], 0
        group.append(word)
        length += len(word)
    if group:
        yield group


def _feature(tokenizer, first: list[list], second: list[list] | None = None, next_sentence: int | None = None) -> dict:
    """[CLS] first [SEP], or [CLS] first [SEP] second [SEP]: what a row is before words are drawn."""
    ids, words, sizes, types, known = [tokenizer.cls_token_id], [-1], [0], [0], 0
    for segment, part in enumerate((first, second) if second else (first,)):
        for word in part:
            tokens = [token for token, _ in word]
            asked = tokenizer.unk_token_id not in tokens
            ids += tokens
            sizes += [size for _, size in word]
            words += [known if asked else -1] * len(word)
            known += asked
        ids.append(tokenizer.sep_token_id)
        words.append(-1)
        sizes.append(0)
        types += [segment] * (len(ids) - len(types))
    feature = {"input_ids": ids, "words": words, "sizes": sizes}
    return feature if next_sentence is None else feature | {"token_type_ids": types, "next_sentence": next_sentence}


def _pairs(documents, tokenizer, room: int):
    """Rows of two texts of whole sentences each, at most `room` tokens together: half of them follow each other, of the other half the
    second is from a text drawn at random, and what would have followed begins the next row (as in BERT's own code). So every sentence
    stands in one row as its own, and in others perhaps as a stranger.

    `documents` are texts as `_document` has them, their pieces sentences, none of them longer than half the room. The last sentence of a
    text has none to follow it, so it gets a stranger; the others make up for that as far as they can. The pairs are drawn once.
    """
    rng, counts = np.random.default_rng(FIXED), Counter()
    for number, document in enumerate(map(_pieces, documents)):
        start = 0
        while start < len(document):
            stop, length = start + 1, _length(document[start])
            while stop < len(document) and length + _length(document[stop]) <= room:
                length += _length(document[stop])
                stop += 1
            middle = start + int(rng.integers(1, stop - start)) if stop > start + 1 else stop
            first, second, answer = sum(document[start:middle], []), None, IGNORE
            behind = counts[0] < counts[1] or (counts[0] == counts[1] and rng.random() < 0.5)
            if middle < stop and (behind or len(documents) == 1):
                second, answer, middle = sum(document[middle:stop], []), 0, stop
            elif len(documents) > 1:
                other = _pieces(documents[(number + int(rng.integers(1, len(documents)))) % len(documents)])
                second, answer = _opening(other[int(rng.integers(len(other))):], room - _length(first)), 1
            counts[answer] += 1
            yield _feature(tokenizer, first, second, answer)
            start = middle


def _opening(sentences: list[list], room: int) -> list:
    """The words of as many whole sentences as fit into `room` tokens, or as much of the first one as does."""
    words = []
    for sentence in sentences:
        if words and _length(words) + _length(sentence) > room:
            break
        words = words + sentence
    return next(_cut(words, room))


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, whole: joined, they are the text again."""
    return [sentence for sentence in _SENTENCE_ENDS.split(text) if sentence]


def _length(words: list[list]) -> int:
    return sum(map(len, words))


def _wanted(words: list[int]) -> int:
    """The number of words to ask for of a row."""
    return max(1, round(MASKED * (max(words) + 1)))


def masked(feature: dict, seed: tuple[int, int, int], mask_id: int, ordinary: np.ndarray) -> dict:
    """A row with 15 % of its words drawn, by a seed of its own: labels there, IGNORE elsewhere, and `bytes`, those of the words drawn.

    Of their tokens, 80 % become `mask_id`, 10 % a token of `ordinary` drawn at random, and 10 % stay (Devlin et al., 2018, section 3.1).
    """
    rng, words, ids = np.random.default_rng(seed), np.array(feature["words"]), np.array(feature["input_ids"])
    drawn = np.isin(words, rng.permutation(max(words) + 1)[: _wanted(feature["words"])])
    fate, strangers = rng.random(len(ids)), ordinary[rng.integers(len(ordinary), size=len(ids))]
    shown = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, strangers, ids))
    return {"input_ids": np.where(drawn, shown, ids).tolist(), "labels": np.where(drawn, ids, IGNORE).tolist(),
            "bytes": int(np.array(feature["sizes"])[drawn].sum()),
            **{key: feature[key] for key in ("token_type_ids", "next_sentence") if key in feature}}


def collate_masked(features: list[dict], pad_id: int, epoch: torch.Tensor, draw) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels and token_type_ids (batch, longest), bytes and next_sentence (batch,). Train rows, which have no
    labels yet, get them here, by the seed, the epoch and their number: whoever resumes a run draws the same."""
    features = [feature if "labels" in feature else draw(feature, (*epoch.tolist(), feature["row"])) for feature in features]
    batch = collate_blocks(features, pad_id)
    if "next_sentence" in features[0]:
        batch["next_sentence"] = torch.tensor([feature["next_sentence"] for feature in features])
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        for i, feature in enumerate(features):
            batch["token_type_ids"][i, : len(feature["token_type_ids"])] = torch.tensor(feature["token_type_ids"])
    return batch


def _told(part: losses.Part) -> torch.Tensor:
    """(rows, 2): whether the model tells right if the second text follows the first, and whether that was asked."""
    return torch.stack([part.logits.argmax(1) == part.targets, part.targets != IGNORE], 1).long()


def next_sentence_accuracy(told: np.ndarray) -> dict[str, float]:
    """Share of the pairs told right, 0-100, from what `_told` gives for all rows."""
    right, asked = np.array(told).T
    return {"next_sentence_accuracy": 100 * float(right[asked > 0].mean()) if asked.any() else float("nan")}


# -------------------------------------------------------------------------------------------------------------- evaluation


def evaluate(candidates: dict, task: Task, rows: list[dict], record: dict, options) -> dict:
    """Loss, perplexity and bits per byte by language and in all, and some texts written on, or their words filled in, by each model.

    The texts of a language are joined by themselves, so that a language's figures are its own.
    """
    languages = [metrics.language_of(row, row["text"]) for row in rows]
    encoded = {language: task.encode([row for row, own in zip(rows, languages, strict=True) if own == language], "rows")
               for language in sorted(set(languages))}
    features = [feature for own, _ in encoded.values() for feature in own]
    where = np.array([language for language, (own, _) in encoded.items() for _ in own])
    pairs = task.loss is losses.masked_and_next_sentence
    headings = COLUMNS | ({"next_sentence_accuracy": "next"} if pairs else {})
    chosen = evaluation.spread(len(features) if task.peft_type != "CAUSAL_LM" else len(rows), options.samples)
    scored, samples, nats = [], [[] for _ in chosen], {}
    for name, candidate in candidates.items():
        model = candidate.load()
        sums, *told = map(np.array, zip(*dataset_outputs(model, candidate.task, features, f"Loss of {name}"), strict=True))
        nats[name] = {i: own[:2].tolist() for i, own in enumerate(sums)}
        for language in [*encoded, "all"]:
            at = (where == language) | (language == "all")
            values = mean_loss(sums[at]) | (next_sentence_accuracy(told[0][at]) if pairs else {})
            scored.append({"language": language, "model": name, "count": sum(language in (own, "all") for own in languages),
                           "values": [values[key] for key in headings]})
        if task.peft_type == "CAUSAL_LM":
            asked, right, answers = write_on(name, model, task, [rows[i]["text"] for i in chosen], options)
        else:
            asked, right, answers = fill_in(name, model, candidate.task, [features[i] for i in chosen])
        for i, sample in enumerate(samples):
            sample += [*([] if sample else [("text", asked[i]), ("right", right[i])]), (name, answers[i])]
    notes = [f"{language}: {sentence}" for language, (_, counts) in encoded.items() for sentence in counts["sentences"]]
    return evaluation.result(headings.values(), scored, UNIT, len(rows), notes=notes, samples=samples,
                             predictions=[{"row": i, **dict(sample)} for i, sample in zip(chosen, samples, strict=True)], losses=nats,
                             signature="perplexity a token, of the model's own tokens; bits per byte of text in UTF-8"
                             + ("" if task.peft_type == "CAUSAL_LM" else ", of the words asked for alone"))


def write_on(name: str, model, task: Task, texts: list[str], options) -> tuple[list[str], list[str], list[str]]:
    """(the beginnings of texts, how they go on, how the model goes on, greedily). A beginning is half a text, or BEGINNING tokens of it."""
    begin, end = ends(task.tokenizer)
    limit = min(BEGINNING, generation.room(model, 0) // 2)
    new = min(options.max_new_tokens, generation.room(model, limit + 1))
    ids = [tokens for _, tokens, _, _ in _tokenized(texts, task.tokenizer)]
    halves = [min(limit, (len(tokens) + 1) // 2) for tokens in ids]
    prompts = [[end if begin is None else begin, *tokens[:half]] for tokens, half in zip(ids, halves, strict=True)]
    written, _ = processes.divided(lambda own: generation.replies(model, task.tokenizer, own, new, options.batch_size,
                                                                  f"Texts of {name}"),
                                   generation.side_by_side([prompts] * len(losses.members(model))))
    decode = partial(task.tokenizer.decode, skip_special_tokens=True)
    return ([decode(tokens[:half]) for tokens, half in zip(ids, halves, strict=True)],
            [decode(tokens[half: half + new]) for tokens, half in zip(ids, halves, strict=True)], written)


def fill_in(name: str, model, task: Task, features: list[dict]) -> tuple[list[str], list[str], list[str]]:
    """(texts in which all words asked for are masked, the words, what the model takes for the likeliest at each place)."""
    places = [np.array(feature["labels"]) != IGNORE for feature in features]
    hidden = [{**feature, "input_ids": np.where(at, task.tokenizer.mask_token_id, feature["input_ids"]).tolist()}
              for feature, at in zip(features, places, strict=True)]
    likeliest = dataset_outputs(model, replace(task, outputs=lambda parts: (_at_their_places(parts[0]),)), hidden, f"Words of {name}")
    texts = [task.tokenizer.decode(feature["input_ids"]) for feature in hidden]
    words = [[np.array(feature["labels"])[at] for feature, at in zip(features, places, strict=True)],
             [found[: len(at)][at] for (_, found), at in zip(likeliest, places, strict=True)]]
    return texts, *([" ".join(task.tokenizer.convert_ids_to_tokens(row.tolist())) for row in part] for part in words)


def _at_their_places(part: losses.Part) -> torch.Tensor:
    """(batch, positions) the likeliest token wherever one is asked for."""
    found = torch.full(part.where.shape, IGNORE, device=part.where.device)
    found[part.where] = part.logits.argmax(-1)
    return found
