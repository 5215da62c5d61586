"""Replies from a model, many at a time.

The turns of a dialogue share their history, so each dialogue is read once, by its longest prompt, and the keys and values of the
shorter prompts are cut from that reading. Reading is done one dialogue at a time, without padding; writing is done in batches, where
it is bound by memory traffic and a batch costs little more than a single reply.
"""

import math

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessor, NoRepeatNGramLogitsProcessor

from recipes.common import chat, faults, losses, processes
from recipes.common.errors import UserError

PART_OF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of bytes that are no whole character


def room(model, max_new_tokens: int) -> int:
    """Tokens a prompt may have so that `max_new_tokens` more fit into the model's window, beside a prefix if it has one."""
    return min((getattr(member.config.get_text_config(), "max_position_embeddings", None) or 10**9) - _prefix_length(member)
               for member in losses.members(model)) - max_new_tokens


def limit(model, max_length: int, max_new_tokens: int) -> int:
    """Tokens a prompt may have: at most `max_length`, and few enough to leave room for a reply. Raises `UserError` if none may."""
    tokens = min(max_length, room(model, max_new_tokens))
    if tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens} leaves no room for a question in the model's window: lower it")
    return tokens


def limits(model, task, max_new_tokens: int) -> list[int]:
    """`limit` for each model that answers: the one, or those of an ensemble, which read by their own tasks. Raises `UserError`."""
    return [limit(member, own.max_length, max_new_tokens) for member, own in zip(losses.members(model), task.readers(), strict=True)]


@torch.inference_mode()
def replies(model, tokenizer, prompts: list[list[int]], max_new_tokens: int = 128, batch_size: int = 32,
            description: str = "Generating", num_beams: int = 1, **search) -> tuple[list[str], int]:
    """Greedy replies to `prompts` (token ids), in their order, and how many of them were cut at `max_new_tokens`.

    The replies equal those of one-by-one generation, up to the rounding of differently shaped matrices. A batch holds the prompts of
    whole dialogues, about `batch_size` of them, and ends when its last reply does. With `num_beams`, beam search without that reading,
    by the rules of `search` (see `write`); an ensemble writes greedily only, and its prompts are those of `side_by_side`. No progress bar
    without a `description`.
    """
    if isinstance(model, losses.Ensemble):
        return _together(model, tokenizer, prompts, max_new_tokens, batch_size, description)
    if num_beams > 1:
        return write(model, tokenizer, prompts, left_pad, max_new_tokens, batch_size, num_beams, description, **search)
    texts, cut = [""] * len(prompts), 0
    with _bar(len(prompts), description) as bar:
        for group in _batches(_chains(prompts), batch_size):
            for i, tokens in _halving(lambda part: _generate(model, tokenizer, prompts, part, max_new_tokens), group).items():
                texts[i], unended = text(tokens, model, tokenizer)
                cut += unended
            bar.update(sum(map(len, group)))
    return texts, cut


@torch.inference_mode()
def write(model, tokenizer, prompts: list[list[int]], pad, max_new_tokens: int, batch_size: int, num_beams: int,
          description: str, length_penalty: float = 1.0, no_repeat_ngram_size: int = 0) -> tuple[list[str], int]:
    """Like `replies`, with `model.generate` on batches of similar length: for encoder-decoders (`pad=right_pad`), alone or as an ensemble,
    and with beams.

    A beam's score is its log-probability / tokens ** length_penalty. No text holds a run of `no_repeat_ngram_size` tokens twice (0: may);
    what it repeats of the prompt does not count. The prompts of an ensemble are those of `side_by_side`.
    """
    model, *others = losses.members(model)
    each = list(zip(*prompts, strict=True)) if others else [prompts]
    texts, cut, order = [""] * len(prompts), 0, sorted(range(len(prompts)), key=lambda i: len(each[0][i]))
    with _bar(len(prompts), description) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start: start + batch_size]
            (ids, mask), *theirs = [[tensor.to(model.device) for tensor in pad([own[i] for i in part], tokenizer.pad_token_id)]
                                    for own in each]
            begun = 1 if losses.network(model).config.is_encoder_decoder else ids.shape[1]  # the start token, or the prompt
            rules = [_Join(others, theirs)] if others else []
            if no_repeat_ngram_size:
                rules.append(_NoRepeat(no_repeat_ngram_size, begun))
            out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=num_beams, max_new_tokens=max_new_tokens,
                                 length_penalty=length_penalty, logits_processor=rules or None)
            for i, tokens in zip(part, out[:, begun:].tolist(), strict=True):
                texts[i], unended = text(tokens, model, tokenizer)
                cut += unended
            bar.update(len(part))
    return texts, cut


def _together(ensemble, tokenizer, prompts, max_new_tokens: int, batch_size: int, description: str) -> tuple[list[str], int]:
    """`replies` of several models at once: each token is the likeliest by the mean of their next-token probabilities."""
    each = list(zip(*prompts, strict=True))  # by member
    texts, cut, order = [""] * len(prompts), 0, sorted(range(len(prompts)), key=lambda i: max(map(len, prompts[i])))
    ends = torch.tensor(ensemble.members[0].generation_config.eos_token_id, device=ensemble.device)
    with _bar(len(prompts), description) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start: start + batch_size]
            padded = [[tensor.to(ensemble.device) for tensor in left_pad([own[i] for i in part], tokenizer.pad_token_id)] for own in each]
            steps = [_Steps(member, mask) for member, (_, mask) in zip(ensemble.members, padded, strict=True)]
            read = [ids for ids, _ in padded]
            written, ended = [], torch.zeros(len(part), dtype=torch.bool, device=ensemble.device)
            while len(written) < max_new_tokens and not ended.all():
                mean = torch.stack([step(ids).float().log_softmax(-1) for step, ids in zip(steps, read, strict=True)]).logsumexp(0)
                ids = mean.argmax(-1, keepdim=True)
                read = [ids] * len(steps)
                written.append(ids[:, 0])
                ended |= torch.isin(ids[:, 0], ends)
            for i, tokens in zip(part, torch.stack(written, 1).tolist(), strict=True):
                texts[i], unended = text(tokens, ensemble.members[0], tokenizer)
                cut += unended
            bar.update(len(part))
    return texts, cut


class _Steps:
    """A model's next-token logits (batch, vocabulary), a call for each token; the first call reads the prompts, padded on the left."""

    def __init__(self, model, mask: torch.Tensor):
        self.writer, self.past, self.mask = losses.network(model) if _prefix_length(model) else model, DynamicCache(), mask
        if _prefix_length(model):
            for i, layer in enumerate(model.get_prompt(batch_size=len(mask)).layers):
                self.past.update(layer.keys.to(model.dtype), layer.values.to(model.dtype), i)
            self.mask = torch.cat([mask.new_ones(len(mask), _prefix_length(model)), mask], 1)
        self.new = 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self.new:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        self.new += 1
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        return self.writer(input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.past, use_cache=True,
                           logits_to_keep=1).logits[:, -1]


class _Join(LogitsProcessor):
    """Makes the next-token scores of one encoder-decoder, within its `generate`, those of the mean probability of it and of the others.

    What its generation config forbids stays forbidden.
    """

    def __init__(self, others: list, prompts: list[tuple[torch.Tensor, torch.Tensor]]):
        """`prompts`: ids and mask of each of the others."""
        self.others = []
        for model, (ids, mask) in zip(others, prompts, strict=True):
            network = losses.network(model)
            read = network.get_encoder()(input_ids=ids, attention_mask=mask)
            past = model.get_prompt(batch_size=len(ids)) if _prefix_length(model) else EncoderDecoderCache(DynamicCache(), DynamicCache())
            self.others.append((network, read, mask, past))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = [network(encoder_outputs=read, attention_mask=mask, decoder_input_ids=input_ids[:, -1:], past_key_values=past,
                          use_cache=True).logits[:, -1] for network, read, mask, past in self.others]
        mean = torch.stack([each.float().log_softmax(-1) for each in (scores, *logits)]).logsumexp(0)
        return mean.masked_fill(scores == -math.inf, -math.inf)


class _NoRepeat(LogitsProcessor):
    """Forbids to write the same `size` tokens twice. `generate`'s own flag counts the prompt too, whose names a target must repeat."""

    def __init__(self, size: int, begun: int):
        self.rule, self.begun = NoRepeatNGramLogitsProcessor(size), begun

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.rule(input_ids[:, self.begun:], scores)


def _bar(total: int, description: str) -> tqdm:
    """A progress bar of the first process; none without a description."""
    return tqdm(total=total, desc=description, unit="replies", disable=not description or processes.rank() > 0)


def _halving(run, group: list) -> dict:
    """What `run(group)` gives, by prompt; where memory runs out, of one half of the group and then of the other. Raises `UserError` if
    there is nothing to halve."""
    try:
        return run(group)
    except RuntimeError as error:
        if not faults.out_of_memory(error):
            raise
    if len(group) == 1:
        raise UserError("out of memory while writing the replies of a single dialogue: lower --max_new_tokens, or use a smaller model")
    half = len(group) // 2
    print(f"note: out of memory while writing the replies of {len(group)} dialogues at once: they are written in two halves")
    return _halving(run, group[:half]) | _halving(run, group[half:])


def text(tokens: list[int], model, tokenizer) -> tuple[str, bool]:
    """What was written up to the token that ends it, and whether there is none. Text that is cut loses the character it was cut within:
    a Chinese one is often several tokens, and some of them alone are read as U+FFFD."""
    ends = model.generation_config.eos_token_id
    length = next((t for t, token in enumerate(tokens) if token in (ends if isinstance(ends, list) else [ends])), None)
    written = tokenizer.decode(tokens[:length], skip_special_tokens=True)
    return (written if length is not None else written.removesuffix(PART_OF_A_CHARACTER)).strip(), length is None


def _chains(prompts: list[list[int]]) -> list[list[int]]:
    """Indices of prompts in groups, each prompt of a group beginning with the one before it; the longest group members first."""
    order, chains = sorted(range(len(prompts)), key=lambda i: prompts[i]), []
    for i in order:
        last = prompts[chains[-1][-1]] if chains else None
        if last is not None and prompts[i][: len(last)] == last:
            chains[-1].append(i)
        else:
            chains.append([i])
    return sorted(chains, key=lambda chain: len(prompts[chain[-1]]), reverse=True)


def _batches(chains: list[list[int]], batch_size: int) -> list[list[list[int]]]:
    """Consecutive chains joined until a batch has `batch_size` prompts."""
    batches, room_left = [], 0
    for chain in chains:
        if room_left < len(chain):
            batches.append([])
            room_left = batch_size
        batches[-1].append(chain)
        room_left -= len(chain)
    return batches


def _generate(model, tokenizer, prompts, group, max_new_tokens: int) -> dict[int, list[int]]:
    """Token ids written after each prompt of `group`, by index."""
    prefix = _prefix_length(model)
    # Behind a learned prefix, the keys and values read from the prompt include it; the model below then does the writing, and sees
    # the prefix as tokens whose ids nobody looks at.
    writer = model.get_base_model() if prefix else model
    keys_values, order = [], []
    for chain in group:
        cache = _read(model, writer, prompts[chain[-1]])
        for i in chain:
            order.append(i)
            end = prefix + len(prompts[i]) - 1  # the last token of a prompt is read when its reply is begun
            keys_values.append([(layer.keys[:, :, :end], layer.values[:, :, :end]) for layer in cache.layers])
    ids, mask = left_pad([[tokenizer.pad_token_id] * prefix + prompts[i] for i in order], tokenizer.pad_token_id)
    past = DynamicCache()
    for layer in range(len(keys_values[0])):
        past.update(*(_stack([row[layer][part] for row in keys_values], ids.shape[1] - 1) for part in (0, 1)), layer)
    out = writer.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), past_key_values=past,
                          do_sample=False, max_new_tokens=max_new_tokens)
    return dict(zip(order, out[:, ids.shape[1]:].tolist(), strict=True))


def _read(model, writer, prompt: list[int]) -> DynamicCache:
    """Keys and values of a prompt, (1, heads, prefix + length, width) in each layer. All layers keep all positions."""
    past = DynamicCache()
    if writer is not model:
        for i, layer in enumerate(model.get_prompt(batch_size=1).layers):
            past.update(layer.keys.to(model.dtype), layer.values.to(model.dtype), i)
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones(1, past.get_seq_length() + len(prompt), dtype=torch.long, device=model.device)
    # No logits but one row of them: the vocabulary is the widest matrix of a small model.
    return writer(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values


def _stack(rows: list[torch.Tensor], length: int) -> torch.Tensor:
    """Tensors (1, heads, n, width) of different n -> (rows, heads, length, width), zeros on the left."""
    return torch.cat([torch.nn.functional.pad(row, (0, 0, length - row.shape[2], 0)) for row in rows])


def left_pad(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, each (prompts, longest), padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def right_pad(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, each (prompts, longest), padded on the right."""
    longest = max(map(len, prompts))
    ids = torch.tensor([p + [pad_id] * (longest - len(p)) for p in prompts])
    return ids, torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])


def turns_to_answer(messages: list[dict]) -> list[int]:
    """Indices of the assistant turns that are trained on: the ones an evaluation asks for."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train") is not False]


def prompts_for(rows: list[dict], tokenizer, limit: int) -> list[tuple[int, int, list[int] | None]]:
    """(row, turn, prompt) for each assistant turn: its true history, never its answer; None where `limit` tokens don't hold it."""
    return [(r, turn, chat.prompt(row["messages"][:turn], tokenizer, limit))
            for r, row in enumerate(rows) for turn in turns_to_answer(row["messages"])]


def side_by_side(each: list[list[list[int] | None]]) -> list:
    """The prompts of an ensemble, a tuple of its members' own, from those of `each` member, which may read less of a text than another;
    None where any member has none. Of one member, its prompts."""
    if len(each) == 1:
        return each[0]
    return [None if None in own else own for own in zip(*each, strict=True)]


def _prefix_length(model) -> int:
    """Positions that a learned prefix takes in the model's window."""
    config = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    return config.num_virtual_tokens if config and config.is_prompt_learning else 0
