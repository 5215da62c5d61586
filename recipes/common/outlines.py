"""What a chat template writes around the texts of a dialogue: found once for all dialogues with the same roles and keys, turn by turn.

Most templates copy what a turn says without a look at it. `outline` renders a template with a stand-in for each value of a turn but its
role. The stand-in of a text can be joined to other text and be written. It can also be asked whether it begins with something, holds it
or has blanks around it: the answer is no, and that is put down as a condition. Whatever else is done with a stand-in, by the template or
inside of Jinja, ends the attempt. So the template goes the same way for every dialogue that meets the conditions, and writes the same
around its texts: this is a proof for all of them, not a guess from some.
"""

import re
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

# What these write becomes text for the rest of the template, which could look at it or change it; so does what a recursive loop writes.
# {% generation %} hands on what is written in it, and a call block can do no more where there are no macros to call.
_BUFFERED = (nodes.Macro, nodes.FilterBlock, nodes.AssignBlock, nodes.Block, nodes.ScopedEvalContextModifier)
_IDENTITY = ("true", "false", "boolean", "sameas")  # tests that compare by identity, of which a stand-in does not hear
_MARK = re.compile("\ue000(\\d+)\ue001")  # a text's place while its template is rendered: private-use characters, which no template has


class Outline(NamedTuple):
    """A rendered dialogue is pieces[0], the text of turn places[0], pieces[1], ..., pieces[-1] if its texts meet the conditions."""

    pieces: tuple[str, ...]
    places: tuple[int, ...]
    conditions: frozenset[tuple[int, str, str | None]]  # (turn, method of its text, argument): see `fits`

    def fits(self, texts: Sequence[str]) -> bool:
        """Whether this is the outline for the turns' texts: none is empty, and each method says no, or changes nothing (strip)."""
        return all(type(text) is str and text for text in texts) and all(
            getattr(texts[turn], method)(argument) in (False, texts[turn]) for turn, method, argument in self.conditions)


def outline(template: str, turns: Sequence[tuple[str, ...]], add_generation_prompt: bool, special_tokens: dict[str, str]) -> Outline | None:
    """The outline of dialogues whose turns have these roles and keys, each (role, key, key, ...), the values being strings, numbers or
    truth values. None if it depends on more than that, or if the template can't be rendered."""
    conditions = set()
    messages = [{key: role if key == "role" else _Text((number,), conditions) if key == "content" else _Hidden() for key in keys}
                for number, (role, *keys) in enumerate(turns)]
    try:
        written = _symbolic(template).render(messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
                                             **special_tokens)
    except (Exception, _Inspected):  # of all kinds, as the template's code is not ours; what is wrong with it shows when it is rendered
        return None
    parts = _MARK.split(written)
    return Outline(tuple(parts[::2]), tuple(map(int, parts[1::2])), frozenset(conditions))


@lru_cache(maxsize=8)
def _symbolic(template: str):
    """`template`, compiled to write stand-ins as marks."""
    environment = _compile_jinja_template(template).environment.overlay(finalize=_written)
    environment.tests = environment.tests | {name: partial(_identical, environment.tests[name]) for name in _IDENTITY}
    parsed = environment.parse(template)
    if any(parsed.find_all(_BUFFERED)) or any(loop.recursive for loop in parsed.find_all(nodes.For)):
        raise _Inspected
    return environment.from_string(template)


def _written(value):
    """Called with each value that the template writes, and with none that it only looks at."""
    if type(value) is not _Text:
        return value
    return "".join(part if isinstance(part, str) else f"\ue000{part}\ue001" for part in value._parts)


def _identical(test, *values) -> bool:
    if any(type(value) in (_Hidden, _Text) for value in values):
        raise _Inspected
    return test(*values)


class _Inspected(BaseException):
    """A stand-in was asked for what it does not know. No Exception, as Jinja goes on after some of them."""


class _Hidden:
    """Stands in for a value that the template may not look at, or the outline would depend on it."""

    def _refuse(self, *_):
        raise _Inspected

    __bool__ = __str__ = __repr__ = __format__ = __eq__ = __hash__ = __len__ = __iter__ = __getitem__ = __contains__ = _refuse
    __int__ = __float__ = __index__ = _refuse
    __class__ = property(_refuse)  # isinstance


class _Text(_Hidden):
    """Stands in for a turn's text, or for such texts joined to others."""

    __class__ = property(lambda self: str)  # as "is string" asks

    def __init__(self, parts: tuple[str | int, ...], conditions: set):
        self._parts, self._conditions = parts, conditions

    def _no(self, method: str, argument) -> bool:
        if len(self._parts) > 1 or type(argument) is not str:
            raise _Inspected
        self._conditions.add((*self._parts, method, argument))
        return False

    def _unchanged(self, method: str, blanks) -> "_Text":
        if len(self._parts) > 1 or type(blanks) not in (str, type(None)):
            raise _Inspected
        self._conditions.add((*self._parts, method, blanks))
        return self

    def _parts_of(self, other) -> tuple[str | int, ...]:
        if type(other) not in (str, _Text):
            raise _Inspected
        return other._parts if type(other) is _Text else (other,)

    def __add__(self, other):
        return _Text(self._parts + self._parts_of(other), self._conditions)

    def __radd__(self, other):
        return _Text(self._parts_of(other) + self._parts, self._conditions)

    def __bool__(self):
        return True  # see `Outline.fits`

    def __eq__(self, other):
        return self._no("__eq__", other)

    __hash__ = _Hidden._refuse

    def __contains__(self, part):
        return self._no("__contains__", part)

    def startswith(self, start):
        return self._no("startswith", start)

    def endswith(self, end):
        return self._no("endswith", end)

    def strip(self, blanks=None):
        return self._unchanged("strip", blanks)

    def lstrip(self, blanks=None):
        return self._unchanged("lstrip", blanks)

    def rstrip(self, blanks=None):
        return self._unchanged("rstrip", blanks)
