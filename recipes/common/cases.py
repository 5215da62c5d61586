"""Golden dialogues: scripted conversations, and rules for what the model has to answer (scripts/check.py).

A file is a YAML list of cases:

    - name: lost parcel
      system: You are the customer service assistant of Maplewood, an online shop.     # optional
      turns:
        - user: Where is my parcel?
          must_ask_for: [order number, MW]        # asks or requests, in a sentence with any of these words
        - user: It is MW204518.
          must_say: [[parcel, package], '/\\d+ days/']  # each entry; of an entry that is a list, any; between slashes a regular expression
          must_not_say: [PIN, password]           # none of them
          must_hand_over: true                    # hands over to a person; or a list of phrases, one of which must be said

Case, runs of blanks and the width of signs (， and ,) make no difference. A word matches whole words only, Chinese any part of a text.
"""

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from recipes.common.errors import UserError

RULES = ("must_say", "must_not_say", "must_ask_for", "must_hand_over")
# A sentence asks for something if it is a question, or has one of these.
REQUESTS = ("please", "tell me", "send me", "give me", "let me know", "i need", "i'd need", "i'll need", "i will need", "could you",
            "can you", "may i",
            "吗", "请", "麻烦", "告诉", "提供", "发我", "给我", "发给", "发来", "报一下", "报给", "说一下", "核对", "核实")
# Ways of the bundled dialogues, and other common ones, to say that a person takes over.
HAND_OVER = (
    r"/\b(connecting|transferring|transfer|connect|passing|putting|handing|hand|pass|put) (you|this|the chat)\b/",
    r"/\b(colleague|specialist|team ?mate|human|agent|supervisor|somebody|someone|person)\b.{0,40}"
    r"\b(will|can|shortly|join|call|ring|contact|be with|take over|look at)/",
    r"/\bpass(ed|ing)? (it |this |that )?on\b/",
    r"/(转接|转给|转到|转人工|转账户组|转值班|转售后|转专员|接人工|接通人工|帮您转|为您转|把您转|交给|移交)/",
    r"/(人工|专员|同事|客服经理|主管).{0,16}(接入|联系|回电|回复|打|处理|跟进|接手|在线)/")


@dataclass
class Turn:
    """What the user says, and rules of RULES for the answer."""

    user: str
    rules: dict = field(default_factory=dict)


@dataclass
class Case:
    """A scripted conversation."""

    name: str
    system: str | None
    turns: list[Turn]


class _OnceLoader(yaml.SafeLoader):
    """YAML that takes no key twice: the second would replace the first, and a rule would be gone without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key.value in [before.value for before in keys[:i]]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice: keep one, with all that "
                                                        "belongs to it", key.start_mark)
        return super().construct_mapping(node, deep)


def load(path: Path) -> list[Case]:
    """The cases of a YAML file. Raises `UserError` that names the file, the case and the key."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _OnceLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--cases {path} can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--cases {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, list) or not content:
        raise UserError(f"--cases {path}: a file is a list of cases, each beginning with \"- name:\"")
    cases = [_case(f"--cases {path}, case {number}", item) for number, item in enumerate(content, start=1)]
    for number, case in enumerate(cases, start=1):
        if case.name in [other.name for other in cases[: number - 1]]:
            raise UserError(f"--cases {path}, case {number}: the name {case.name!r} is taken; give each case a name of its own")
    return cases


def _case(where: str, item) -> Case:
    _keys(where, item, {"name", "turns"}, {"system"})
    _text(f"{where}, name", item["name"])
    where = f"{where} ({item['name']})"
    if "system" in item:
        _text(f"{where}, system", item["system"])
    if not isinstance(item["turns"], list) or not item["turns"]:
        raise UserError(f"{where}, turns: give a list of turns, each beginning with \"- user:\"")
    turns = []
    for number, turn in enumerate(item["turns"], start=1):
        at = f"{where}, turn {number}"
        _keys(at, turn, {"user"}, set(RULES))
        _text(f"{at}, user", turn["user"])
        turns.append(Turn(turn["user"], {key: _rule(f"{at}, {key}", key, turn[key]) for key in RULES if key in turn}))
    if not any(turn.rules for turn in turns):
        raise UserError(f"{where}: no turn has a rule, so it could not fail; give one of {', '.join(RULES)}")
    return Case(item["name"], item.get("system"), turns)


def _keys(where: str, item, needed: set[str], allowed: set[str]) -> None:
    if not isinstance(item, dict):
        raise UserError(f"{where}: give keys and values, not {type(item).__name__}")
    if missing := sorted(needed - item.keys()):
        raise UserError(f"{where}: the key {missing[0]!r} is missing")
    if unknown := sorted(map(str, item.keys() - needed - allowed)):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(needed | allowed))}")


def _text(where: str, value) -> None:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: give a text, not {value!r} (quote numbers and yes or no)")


def _rule(where: str, key: str, value):
    """A rule in its full form: must_say a list of lists, the others a list of patterns. Raises `UserError`."""
    if key == "must_hand_over" and value is True:
        return list(HAND_OVER)
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: give a text or a list of them" + (", or true" if key == "must_hand_over" else ""))
    for entry in entries:
        if isinstance(entry, list) and entry and key == "must_say":
            for one in entry:
                _pattern(where, one)
        else:
            _pattern(where, entry)
    return [entry if isinstance(entry, list) else [entry] for entry in entries] if key == "must_say" else entries


def _pattern(where: str, text) -> None:
    _text(where, text)
    try:
        pattern(text)
    except re.error as error:
        raise UserError(f"{where}: {text} is no regular expression ({error})") from error


def pattern(text: str) -> re.Pattern:
    """What a text of a rule matches, within what `plain` makes of an answer."""
    if len(text) > 2 and text[0] == text[-1] == "/":
        return re.compile(_plain_expression(text[1:-1]), re.IGNORECASE)
    text = plain(text)
    # Whole words, where a letter or digit of a spaced script stands at the end of the text: "PIN" is not in "shipping".
    begin, end = (r"(?<![a-z0-9_])" if text[0].isascii() and text[0].isalnum() else "",
                  r"(?![a-z0-9_])" if text[-1].isascii() and text[-1].isalnum() else "")
    return re.compile(begin + re.escape(text) + end)


def _plain_expression(text: str) -> str:
    """A regular expression as `plain` makes an answer: a sign of another width stands for the usual one, and means itself: ？ is a question
    mark, and no quantifier."""
    return "".join(re.escape(usual) if (usual := unicodedata.normalize("NFKC", sign)) != sign else sign
                   for sign in text.replace("’", "'"))


def plain(text: str) -> str:
    """`text` in lower case, with signs of normal width and single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("’", "'").split())


def sentences(text: str) -> list[str]:
    """The sentences of a plain text, each with the sign that ends it."""
    return [part for part in re.split(r"(?<=[!?。;])\s*|(?<=\.)\s+", text) if part.strip()]


def judge(rules: dict, answer: str) -> list[str]:
    """What is wrong with an answer: a sentence for each rule that it breaks."""
    said = plain(answer)
    if not said:
        return ["the model said nothing"]
    wrong = []
    for entry in rules.get("must_say", []):
        if not any(pattern(text).search(said) for text in entry):
            wrong.append(f"must_say: {' or '.join(entry)}")
    for text in rules.get("must_not_say", []):
        if found := pattern(text).search(said):
            wrong.append(f"must_not_say: {text} (said: {found[0]})")
    if "must_ask_for" in rules:
        asking = [one for one in sentences(said) if one.endswith("?") or any(pattern(word).search(one) for word in REQUESTS)]
        if not any(pattern(text).search(one) for one in asking for text in rules["must_ask_for"]):
            wrong.append(f"must_ask_for: {' or '.join(rules['must_ask_for'])}")
    if "must_hand_over" in rules and not any(pattern(text).search(said) for text in rules["must_hand_over"]):
        own = rules["must_hand_over"] != list(HAND_OVER)
        wrong.append("must_hand_over: " + (" or ".join(rules["must_hand_over"]) if own else "to a person"))
    return wrong
