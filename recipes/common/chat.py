"""A dialogue as a model sees it: token ids, and which of them are trained on.

Loss falls on each assistant turn and on the token that ends it, nothing else. Chat templates rarely say where a turn begins
and ends in the text, so `spans` finds out by rendering and *proves* what it found: the text before a turn must begin with
exactly the prompt that the model will see when it has to answer, and the turn must be closed by a special token. A template for
which this can't be proved is refused. The proof is made once for all dialogues of one outline (outlines.py) where the template lets it,
else for each dialogue. The tokenizer is handed in; nothing here reads files or knows a model.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import tokenizers
import torch
from transformers.utils.chat_template_utils import _REASONING_FIELDS, _compile_jinja_template

from recipes.common import outlines
from recipes.common.errors import UserError

IGNORE = -100  # label of a position without loss (torch.nn.functional.cross_entropy's default)

# For models that ship no template (GPT-2, most base models). Plain text that such a model has seen the like of, and only tokens
# that it already knows: `eos` ends an assistant turn, `bos` opens the dialogue where the model has one of its own.
PLAIN_TEMPLATE = (
    "{%- if bos_token and bos_token != eos_token %}{{ bos_token }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{%- elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token + '\n\n' }}"
    "{%- else %}{{ 'User: ' + message.content + '\n\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

PLAIN = (str, bool, int)  # values of a turn that a template gets as they are
# Stands in for an assistant turn while its place in the rendered text is looked up. Private-use characters: no data has them.
_MARK = "\ue000turn\ue001"


@dataclass(frozen=True)
class Encoded:
    """One dialogue, ready to train on. `labels[t]` is `input_ids[t]` where it is trained on, else `IGNORE`; not shifted."""

    input_ids: list[int]
    labels: list[int]
    dropped_turns: int = 0  # oldest turns that max_length left no room for


class _Layout(NamedTuple):
    """The places of the answers in all dialogues of one outline."""

    outline: outlines.Outline  # with the conditions of the prompts as well
    answers: dict[int, tuple[int, int]]  # turn: characters from the span's start to the answer's, and from the answer's end to the span's


class TemplateError(ValueError):
    """The template can't render this dialogue, or the place of its assistant turns can't be proved."""


def prepare(tokenizer) -> str | None:
    """Make `tokenizer` ready for dialogues; returns a sentence on what was changed, or None.

    Gives it `PLAIN_TEMPLATE` if it has no chat template, and pads with the end-of-text token if it has no padding token (padded
    positions are masked by number, never by token id, so the end-of-turn token stays trained even then). Raises `UserError` when
    the template, its own or ours, can't be proved to mark assistant turns.
    """
    notes = []
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {type(tokenizer).__name__} gives no character offsets, so answers can't be told from prompts: "
                        "use a model with a fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end-of-text token, so a reply could never end: use a generative language model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        notes.append("the model ships no chat template: a plain one (User: / Assistant:) is used and saved with it")
    _prove(tokenizer)
    return "; ".join(notes) or None


def encode(messages: list[dict], tokenizer, max_length: int) -> Encoded | None:
    """Tokenize a dialogue and mark what is trained on.

    A dialogue of more than `max_length` tokens loses whole turns, the oldest first, up to the next user turn; the system turn
    and the last answer stay. Returns None when even the last user turn with its answer is too long, or no turn is trained on.
    Raises `TemplateError` when the template can't render the dialogue.
    """
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for start in _starts(messages, answers[-1] if answers else len(messages)):
        kept = messages[: _first(messages)] + messages[start:]
        encoded = _encode_whole(kept, tokenizer)
        if len(encoded.input_ids) <= max_length:
            if all(label == IGNORE for label in encoded.labels):
                return None
            return Encoded(encoded.input_ids, encoded.labels, len(messages) - len(kept))
    return None


def prompt(messages: list[dict], tokenizer, max_length: int) -> list[int] | None:
    """Token ids of `messages` followed by the template's opening of an assistant turn, as `encode` would have them.

    Shortened like in `encode`; None when even the last user turn alone exceeds `max_length`. Raises `TemplateError`.
    """
    for start in _starts(messages, len(messages)):
        kept = messages[: _first(messages)] + messages[start:]
        before = _render([*kept, {"role": "assistant", "content": _MARK}], tokenizer).partition(_MARK)[0]
        ids = tokenizer(_opening(kept, tokenizer, before), add_special_tokens=False)["input_ids"]
        if len(ids) <= max_length:
            return ids
    return None


def _first(messages: list[dict]) -> int:
    """Index of the first turn after the system turn, if there is one."""
    return int(bool(messages) and messages[0]["role"] == "system")


def _starts(messages: list[dict], answer: int) -> list[int]:
    """Where a shortened dialogue may begin so that turn `answer` has a user turn before it: whole, then at each user turn."""
    first = _first(messages)
    return [first] + [i for i in range(first + 1, answer)
                      if messages[i]["role"] == "user" and messages[i - 1]["role"] != "user"]


def spans(messages: list[dict], tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The rendered dialogue and, for each assistant turn, the characters [start, end) that the model has to write.

    A span runs from the end of the prompt that the model answers to through the token that ends the turn. Proved for every
    dialogue: see the module's docstring. Raises `TemplateError`.
    """
    if not _is_plain(messages) or not isinstance(tokenizer.chat_template, str):
        return _rendered_spans(messages, tokenizer)
    texts = [turn.get("content") for turn in messages]
    layout = _layout(tokenizer, tokenizer.chat_template, tuple(tokenizer.special_tokens_map.items()),
                     tuple((turn["role"], *turn) for turn in messages))
    if layout is None or not layout.outline.fits(texts):
        return _rendered_spans(messages, tokenizer)
    written, found, position = [layout.outline.pieces[0]], [], len(layout.outline.pieces[0])
    for turn, piece in zip(layout.outline.places, layout.outline.pieces[1:], strict=True):
        end = position + len(texts[turn])
        if turn in layout.answers:
            before, after = layout.answers[turn]
            found.append((position - before, end + after))
        written += texts[turn], piece
        position = end + len(piece)
    return "".join(written), found


@lru_cache(maxsize=4096)
def _layout(tokenizer, template: str, special_tokens: tuple[tuple[str, str], ...], turns: tuple[tuple[str, ...], ...]) -> _Layout | None:
    """Where the answers stand in each dialogue with these roles and keys (outlines.outline); None if that can't be told of all alike."""
    whole, answers = outlines.outline(template, turns, False, dict(special_tokens)), {}
    assistant = [number for number, (role, *_) in enumerate(turns) if role == "assistant"]
    if whole is None or 0 in assistant or [turn for turn in whole.places if turn in assistant] != assistant:
        return None  # how the assistant opens a dialogue is looked up otherwise: see _asked
    conditions = whole.conditions
    for turn in assistant:
        at, asked = whole.places.index(turn), outlines.outline(template, turns[:turn], True, dict(special_tokens))
        if asked is None or (asked.places, asked.pieces[:-1]) != (whole.places[:at], whole.pieces[:at]):
            return None
        before, after = whole.pieces[at], whole.pieces[at + 1]
        own, end = before.removeprefix(asked.pieces[-1]), after.lstrip()
        if not before.startswith(asked.pieces[-1]) or any(token.startswith(end) and token != end for token in _specials(tokenizer)):
            return None  # the latter: what follows may make it a longer token
        try:
            answers[turn] = 0 if own.strip() else len(own), _end_of_turn(after, tokenizer)
        except TemplateError:
            return None
        conditions |= asked.conditions
    return _Layout(whole._replace(conditions=conditions), answers)


def _rendered_spans(messages: list[dict], tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """`spans` by rendering this dialogue, and once more for each answer."""
    text = _render(messages, tokenizer)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    marked = _render([{**m, "content": f"{_MARK}{i}{_MARK}"} if m["role"] == "assistant" else m
                      for i, m in enumerate(messages)], tokenizer)
    found, position, rest = [], 0, marked
    for i in turns:
        before, mark, rest = rest.partition(f"{_MARK}{i}{_MARK}")
        if not mark or mark in rest:
            raise TemplateError(f"the chat template does not write the assistant's turn {i + 1} exactly once")
        if not text.startswith(before, position):
            raise TemplateError(f"the chat template writes what precedes turn {i + 1} differently according to the answer")
        content = next((c for c in (messages[i]["content"], messages[i]["content"].strip())
                        if text.startswith(c, position + len(before))), None)
        if content is None:
            raise TemplateError(f"the chat template changes the text of turn {i + 1}")
        start = position + len(before)
        position = start + len(content)
        opening = _opening(messages[:i], tokenizer, text[:start])
        found.append((len(opening), position + _end_of_turn(rest, tokenizer)))
    if not text.startswith(rest, position) or len(text) != position + len(rest):
        raise TemplateError("the chat template writes the end of the dialogue differently according to the answers")
    return text, found


def pad(rows: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of rows: input_ids, attention_mask and labels, each (rows, longest), padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": torch.full((len(rows), longest), pad_id), "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
             "labels": torch.full((len(rows), longest), IGNORE)}
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][i, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][i, :length] = 1  # by length, not by token id: the pad token may be the end-of-turn token
        batch["labels"][i, :length] = torch.tensor(row["labels"])
    return batch


def end_of_turn_id(tokenizer) -> int:
    """The token that ends an assistant turn in the tokenizer's chat template: generation must stop at it."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text, [(_, end)] = spans(messages, tokenizer)
    return _tokens(text[:end], tokenizer).ids[-1]


def _encode_whole(messages: list[dict], tokenizer) -> Encoded:
    text, turns = spans(messages, tokenizer)
    train = [m.get("train") is not False for m in messages if m["role"] == "assistant"]
    encoding = _tokens(text, tokenizer)
    ids, offsets = encoding.ids, encoding.offsets
    labels = [IGNORE] * len(ids)
    for (start, end), kept in zip(turns, train, strict=True):
        # A token belongs to the answer if it starts there: one that straddles the border before it (a blank) is the prompt's, and
        # an end of turn that swallows the line break after it (Phi-3's has rstrip) is still the answer's. Tokenizers that trim
        # offsets (Pythia, OLMo) give a token of blanks start == end, its own end: hence the while.
        first, after = bisect_left(offsets, (start, 0)), bisect_left(offsets, (end, 0))
        while first < after and offsets[first][1] <= start:
            first += 1
        if kept:
            labels[first:after] = ids[first:after]
    return Encoded(ids, labels)


def _tokens(text: str, tokenizer) -> tokenizers.Encoding:
    """What calling `tokenizer` does, without what it takes to make a batch of one text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    # add_special_tokens=False: the template has written bos where the model wants it; the tokenizer would write a second one.
    return backend.encode(text, add_special_tokens=False)


def _render(messages: list[dict], tokenizer, add_generation_prompt: bool = False) -> str:
    """What `tokenizer.apply_chat_template` writes. Turns of plain values need none of its conversions, which take it half its time."""
    try:
        if _is_plain(messages):
            template = _compile_jinja_template(tokenizer.get_chat_template())
            return template.render(messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
                                   **tokenizer.special_tokens_map)
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # Jinja's raise_exception and every other failure of a template's own code
        raise TemplateError(f"the model's chat template can't render this dialogue ({error})") from error


def _is_plain(messages: list[dict]) -> bool:
    """Whether a template gets these turns as they are."""
    return bool(messages) and all(
        type(value) in PLAIN and key not in _REASONING_FIELDS for turn in messages for key, value in turn.items())


def _opening(messages: list[dict], tokenizer, before: str) -> str:
    """The part of `before`, the text ahead of an answer to `messages`, that the model is given; the rest is its own to write.

    That is the template's prompt for a reply. Blanks after it belong to the answer, as tokenizers join them to its first word. Anything
    else (Qwen3's empty thinking block) is written by the template, so the model is given that too.
    """
    asked = _asked(messages, tokenizer)
    if not before.startswith(asked):
        raise TemplateError(f"the prompt before turn {len(messages) + 1} is not what the template writes when a reply is asked for")
    return before if before[len(asked):].strip() else asked


def _asked(messages: list[dict], tokenizer) -> str:
    """What the template writes to ask for a reply to `messages`."""
    if messages:
        return _render(messages, tokenizer, add_generation_prompt=True)
    # The assistant speaks first. An empty dialogue can't be rendered, so the opening is looked up in one of a single turn.
    user = [{"role": "user", "content": "a"}]
    asked = _render(user, tokenizer, add_generation_prompt=True).removeprefix(_render(user, tokenizer))
    before = _render([{"role": "assistant", "content": _MARK}], tokenizer).partition(_MARK)[0]
    if not asked or asked not in before:
        raise TemplateError("the chat template does not say how the assistant opens a dialogue")
    return before[: before.rindex(asked) + len(asked)]


def _end_of_turn(rest: str, tokenizer) -> int:
    """Length of the text from the end of an answer through the special token that ends the turn; blanks may precede it."""
    blanks = len(rest) - len(rest.lstrip())
    ends = [len(token) for token in _specials(tokenizer) if rest.startswith(token, blanks)]
    if not ends:
        raise TemplateError("the chat template does not end an assistant turn with a special token, so a reply could never end")
    return blanks + max(ends)


@lru_cache(maxsize=8)
def _specials(tokenizer) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _prove(tokenizer) -> None:
    """Check the template on dialogues of our own, down to the token ids that generation will start from."""
    one = [{"role": "user", "content": "Is it open?"}, {"role": "assistant", "content": "Yes, until nine."}]
    two = one + [{"role": "user", "content": "谢谢。"}, {"role": "assistant", "content": "不客气！"}]
    for messages in (one, two):
        try:
            encoded = _encode_whole(messages, tokenizer)
            turns = sum(m["role"] == "assistant" for m in messages)
            if encoded.labels.count(end_of_turn_id(tokenizer)) != turns:  # written after the last turn only, or after none
                raise TemplateError("not every assistant turn ends with the token that ends the last one")
            # The last answer: what a template writes before earlier ones may differ (Qwen3 drops the thinking block from history).
            opening = prompt(messages[:-1], tokenizer, max_length=10**9)
            if encoded.input_ids[: len(opening)] != opening or encoded.labels[len(opening)] == IGNORE:
                raise TemplateError("an answer's first token is not the one that follows the prompt")
        except TemplateError as error:
            raise UserError(f"this model's chat template can't be trained on safely: {error}; give the tokenizer another "
                            "chat_template, or remove it to use the plain one") from error
