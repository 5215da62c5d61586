"""The rows in data/slots keep what their data card promises."""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT

from recipes.common import metrics
from recipes.common.data import check_tag

SPLITS = {split: [json.loads(line) for line in (ROOT / f"data/slots/{split}.jsonl").read_text(encoding="utf-8").splitlines()]
          for split in ("train", "dev", "test")}
TYPES = {"order_id", "product", "amount", "date", "time", "city", "person", "card_last4", "phone", "email"}
SHAPES = {"card_last4": r"\d{4}", "order_id": r"MW\d{6}", "email": r"\S+@example\.(com|org|net)",  # names that are nobody's
          "phone": r"07700900\d{3}|555-01\d\d|1[35-9]\d00000\d{3}"}


def check(row: dict) -> str | None:
    """What is wrong with a row, or None: IOB2 without a stray I-, known types, and Chinese by the character."""
    if wrong := check_tag(row):
        return wrong
    for before, tag in zip(["O", *row["tags"]], row["tags"], strict=False):
        if not re.fullmatch(r"O|[BI]-\w+", tag) or tag != "O" and tag[2:] not in TYPES:
            return f"unknown tag {tag}"
        if tag[0] == "I" and before[1:] != tag[1:]:
            return f"{tag} continues nothing"
    if row["language"] not in ("en", "zh"):
        return "unknown language"
    for token in row["tokens"]:
        if re.search(r"\s", token) or re.search(r"[\u4e00-\u9fff]", token) and (len(token) > 1 or row["language"] == "en"):
            return f"{token!r} is no single word or character"
    for kind, text in spans(row):
        if kind in SHAPES and not re.fullmatch(SHAPES[kind], text):
            return f"{text} is no {kind}"
    return None


def spans(row: dict) -> list[tuple[str, str]]:
    return [(kind, "".join(row["tokens"][start:end])) for kind, start, end in metrics.spans(row["tags"])]


def shape(row: dict) -> str:
    """A row with each span replaced by its type, and no digits or case: equal for two rows made from one template."""
    found, at = [], 0
    for kind, start, end in metrics.spans(row["tags"]):
        found += [*row["tokens"][at:start], f"<{kind}>"]
        at = end
    return re.sub(r"\d", "0", " ".join([*found, *row["tokens"][at:]]).lower())


def test_sizes():
    assert {split: Counter(row["language"] for row in rows) for split, rows in SPLITS.items()} == {
        "train": {"en": 110, "zh": 110}, "dev": {"en": 20, "zh": 20}, "test": {"en": 20, "zh": 20}}


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_iob2(split):
    assert [(i, wrong) for i, row in enumerate(SPLITS[split], start=1) if (wrong := check(row))] == []


@pytest.mark.parametrize(("row", "wrong"), [
    ({"tokens": ["in", "Rome"], "tags": ["O", "I-city"], "language": "en"}, "continues nothing"),
    ({"tokens": ["in", "Rome"], "tags": ["B-date", "I-city"], "language": "en"}, "continues nothing"),
    ({"tokens": ["in", "Rome"], "tags": ["O", "B-town"], "language": "en"}, "unknown tag"),
    ({"tokens": ["in", "Rome"], "tags": ["O"], "language": "en"}, "2 tokens"),
    ({"tokens": ["在", "北京"], "tags": ["O", "B-city"], "language": "zh"}, "no single"),
    ({"tokens": ["card", "447"], "tags": ["O", "B-card_last4"], "language": "en"}, "447 is no card_last4"),
    ({"tokens": ["mail", "a@b.com"], "tags": ["O", "B-email"], "language": "en"}, "is no email"),
])
def test_a_wrong_row_is_found(row, wrong):
    assert wrong in check(row)


def test_no_sentence_occurs_twice_not_even_with_other_values():
    shapes = Counter(shape(row) for rows in SPLITS.values() for row in rows)
    assert [text for text, count in shapes.items() if count > 1] == []
    row = {"tokens": ["Is", "MW111111", "here", "?"], "tags": ["O", "B-order_id", "O", "O"]}
    assert shape(row) == shape({**row, "tokens": ["is", "MW222222", "here", "?"]})


def test_every_type_is_learned_and_scored_in_both_languages():
    for language in ("en", "zh"):
        counts = {split: Counter(kind for row in rows if row["language"] == language for kind, _ in spans(row))
                  for split, rows in SPLITS.items()}
        assert all(counts[split].keys() == TYPES for split in SPLITS)
        assert min(counts["train"].values()) >= 3
        outside = sum(set(row["tags"]) == {"O"} for row in SPLITS["train"] if row["language"] == language)
        assert 5 <= outside <= 30  # a model must also learn to find nothing


def test_the_data_card_counts_right():
    card = (ROOT / "data/README.md").read_text(encoding="utf-8")
    for kind in sorted(TYPES):
        counts = [sum(found == kind for row in SPLITS[split] for found, _ in spans(row)) for split in ("train", "dev", "test")]
        ending = " | ".join(map(str, counts)) + " |"
        assert any(line.startswith(f"| `{kind}` |") and line.endswith(f" | {ending}") for line in card.splitlines()), (kind, counts)
