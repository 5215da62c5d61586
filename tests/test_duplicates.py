"""Duplicates and leaks: constructed ones are found, and on random corpora the answer is that of comparing all pairs."""

import json
import random
from itertools import combinations

import pytest
from conftest import ROOT

from recipes.common import duplicates
from recipes.common.duplicates import Texts, jaccard, leaks, near_duplicates, row_text, shingles

ENGLISH = "I ordered a coffee grinder two weeks ago and it still has not arrived, so could you please tell me where the parcel is now?"
CHINESE = "我两周前在你们店里买了一台咖啡机，到现在还没有收到货，麻烦帮我查一下包裹现在到哪里了，谢谢"
WORDS = ["order", "parcel", "refund", "where", "is", "my", "the", "late", "card", "lost", "please", "cancel", "address", "invoice",
         "coupon", "订单", "退款", "什么时候", "到账", "快递", "没收到", "请问", "发票"]


def dialogue(*contents: str, **columns) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)], **columns}


def corpus(seed: int, size: int) -> list[str]:
    """Random texts of both languages, about half of them an earlier one with a few words changed: similarities from 0 to 1."""
    rng = random.Random(seed)
    texts = []
    for _ in range(size):
        if texts and rng.random() < 0.5:
            words = rng.choice(texts).split()
            for _ in range(rng.randint(0, 3)):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
        else:
            words = rng.choices(WORDS, k=rng.randint(3, 40))
        texts.append(" ".join(words))
    return texts


def all_pairs(texts: list[str], threshold: float) -> list[list[int]]:
    """Groups linked by similar pairs, by comparing all of them."""
    group = list(range(len(texts)))
    pieces = [shingles(text) for text in texts]
    for i, j in combinations(range(len(texts)), 2):
        if jaccard(pieces[i], pieces[j]) >= threshold and group[i] != group[j]:
            group = [group[i] if g == group[j] else g for g in group]
    together = {}
    for i, g in enumerate(group):
        together.setdefault(g, []).append(i)
    return sorted(members for members in together.values() if len(members) > 1)


# Shingles


def test_shingles_of_both_languages():
    assert shingles("Refunds") == {"refun", "efund", "funds"}
    assert shingles("退款到账") == {"退款", "款到", "到账"}
    assert shingles("退款iPhone 15吧") == {"退款", "iphon", "phone", "hone ", "one 0", "吧"}, "whichever number it is"
    assert shingles("Hi") == {"hi"} and shingles(" \n ") == shingles("") == set()


def test_case_width_and_blanks_make_no_difference():
    assert shingles("ＯＫ，  Thank\tYOU\n") == shingles("ok, thank you")
    assert shingles("ok, thank you") != shingles("ok, thank me")


def test_jaccard():
    assert jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5
    assert jaccard({"a"}, {"b"}) == 0 and jaccard({"a"}, {"a"}) == jaccard(set(), set()) == 1 and jaccard(set(), {"a"}) == 0


@pytest.mark.parametrize("row, text", [
    ({"messages": [{"role": "system", "content": "Shop."}, *dialogue("Hi", "Yo")["messages"]]}, "Hi\nYo"),
    ({"text": "a", "label": "x"}, "a"),
    ({"text": "a", "text_pair": "b", "label": 1}, "a\nb"),
    ({"source": "Hi", "target": "你好"}, "Hi\n你好"),
    ({"tokens": ["New", "York"], "tags": ["B", "I"]}, "New York"),
])
def test_the_text_of_a_row(row, text):
    assert row_text(row) == text


# Within a data set


@pytest.mark.parametrize("text, changed", [
    (ENGLISH, ENGLISH.replace("two weeks", "six weeks")), (ENGLISH, ENGLISH + " Thanks!"), (ENGLISH, ENGLISH.replace("coffee", "coffe")),
    (CHINESE, CHINESE.replace("两", "三")), (CHINESE, CHINESE + "！"), (CHINESE, CHINESE.replace("咖啡机", "咖啡壶")),
])
def test_a_small_change_is_a_near_duplicate(text, changed):
    found = near_duplicates(["没有关系", text, "Nothing to see here", changed])
    assert found.groups == [[1, 3]] and found.exact == [] and found.comparisons >= 1 and found.skipped == 0


@pytest.mark.parametrize("text, other", [
    (ENGLISH, "Where is the coffee grinder that I ordered two weeks ago? It still has not come and nobody tells me about the parcel."),
    (CHINESE, "你们店里的咖啡机我两周前就下单了，包裹到现在连影子都没有，请马上查清楚"),
    (ENGLISH, CHINESE), (ENGLISH, ENGLISH[:60]), (CHINESE, CHINESE[:20]),
])
def test_another_wording_is_none(text, other):
    assert near_duplicates([text, other]).groups == []


def test_equal_texts_are_exact_duplicates_and_need_no_comparison():
    found = near_duplicates(["a b", ENGLISH, "A  b ", CHINESE, "ａ b", ENGLISH])
    assert found.exact == found.groups == [[0, 2, 4], [1, 5]]
    assert found.comparisons == 0


def test_exact_duplicates_of_near_duplicates_join_the_group():
    changed = ENGLISH + " Thanks!"
    found = near_duplicates([ENGLISH, changed, ENGLISH.upper(), changed])
    assert found.exact == [[0, 2], [1, 3]] and found.groups == [[0, 1, 2, 3]]


def test_groups_hold_what_is_linked_over_a_third_text():
    a, b, c = ENGLISH, ENGLISH + " Thank you so much!", ENGLISH.replace("I ordered a", "We got a new") + " Thank you so much!"
    assert jaccard(shingles(a), shingles(b)) >= 0.8 <= jaccard(shingles(b), shingles(c)) and jaccard(shingles(a), shingles(c)) < 0.8
    assert near_duplicates([a, c, b]).groups == [[0, 1, 2]] and near_duplicates([a, c]).groups == []


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_that_of_comparing_all_pairs(seed, threshold):
    texts = corpus(seed, 150)
    found = near_duplicates(texts, threshold)
    assert found.groups == all_pairs(texts, threshold) and found.skipped == 0
    assert found.groups, "a corpus without duplicates proves nothing"
    assert found.comparisons < 150 * 149 / 2


def test_most_pairs_are_never_compared():
    texts = corpus(7, 2000)
    comparisons = [near_duplicates(texts[:n]).comparisons for n in (500, 2000)]
    assert 0 < comparisons[1] < 2000 * 1999 / 2 / 100
    assert comparisons[1] < 8 * comparisons[0], "four times the texts: 16 times the pairs, about four times the comparisons"


def test_the_same_input_gives_the_same_output():
    texts = corpus(3, 200)
    assert near_duplicates(texts) == near_duplicates(list(texts))


def test_a_large_group_costs_one_comparison_a_text():
    texts = [f"{ENGLISH} {ENGLISH} {i}" for i in range(1500)]
    found = near_duplicates(texts)
    assert found.groups == [list(range(1500))] and found.comparisons < 1700 and found.skipped == 0


def test_what_a_full_band_leaves_out_is_counted(monkeypatch):
    rng = random.Random(0)
    texts = [ENGLISH + " " + "".join(rng.choices("abcdefgh", k=60)) for _ in range(300)]  # about 0.5 alike, each with all
    assert near_duplicates(texts).skipped == 0
    monkeypatch.setattr(duplicates, "MOST_COMPARED", 3)
    assert near_duplicates(texts).skipped > 0
    split = [dialogue(text) for text in texts]
    assert leaks(split[:200], split[200:], []).skipped > 0


def test_no_text_and_one_text_have_no_duplicates():
    for texts in ([], ["a"], [""], ["", "a"]):
        found = near_duplicates(texts)
        assert (found.exact, found.groups, found.comparisons) == ([], [], 0)
    assert near_duplicates(["", " "]).exact == [[0, 1]]


@pytest.mark.parametrize("threshold", [0, 0.05, 1.01, -1, float("nan")])
def test_an_impossible_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be between 0.1 and 1, not"):
        near_duplicates(["a", "b"], threshold)
    with pytest.raises(ValueError, match="threshold must be between 0.1 and 1, not"):
        leaks([], [], [], threshold)


# Across splits


def test_leaks_by_text_and_by_id():
    train = [dialogue(ENGLISH, "One moment.", id="a"), dialogue(CHINESE, "稍等", id="b"), dialogue("Hi", "Hello", id="c"),
             dialogue("x", "y")]
    dev = [dialogue("Are you open?", "Yes.", id="d"), dialogue(ENGLISH.upper(), "One  moment.", id="e"), dialogue("Bye", "Bye", id="c")]
    test = [dialogue(CHINESE.replace("两", "三"), "稍等", id="b"), dialogue("Are you open?", "Yes.", id="f"), dialogue("q", "r")]
    found = leaks(train, dev, test).found
    assert [(leak.split, leak.row, leak.of_split, leak.of_row, leak.kind) for leak in found] == [
        ("dev", 1, "train", 0, "exact"), ("dev", 2, "train", 2, "id"),
        ("test", 0, "train", 1, "id"), ("test", 0, "train", 1, "near"), ("test", 1, "dev", 0, "exact"),
    ]
    assert [leak.similarity for leak in found][:2] == [1.0, 0.0] and 0.8 <= found[3].similarity == found[2].similarity < 1


def test_duplicates_within_a_split_are_no_leaks():
    row, other = dialogue(ENGLISH, "Yes", id="a"), dialogue(ENGLISH + " Thanks!", "Yes", id="b")
    for splits in (([row, row, other], [], []), ([], [row, row, other], []), ([], [], [row, row, other])):
        assert leaks(*splits).found == []
    assert {leak.kind for leak in leaks([row], [row], []).found} == {"exact", "id"}


def test_an_id_may_be_anything_or_missing():
    train, dev = ([dialogue(text, "Yes", id=value) for value in (7, None, ["a"])] for text in ("Are you open?", "我的包裹在哪里？"))
    found = leaks(train, dev, [dialogue("Hello", "Hi", id="7")]).found
    assert [(leak.split, leak.row, leak.of_row, leak.kind) for leak in found] == [
        ("dev", 0, 0, "id"), ("dev", 2, 2, "id"), ("test", 0, 0, "id")]


def test_a_common_system_turn_is_no_leak():
    system = {"role": "system", "content": ENGLISH}
    train, dev = ([{"messages": [system, *dialogue(*turns)["messages"]]}] for turns in (("Hi", "Hello"), ("Bye", "See you")))
    assert leaks(train, dev, []).found == []


@pytest.mark.parametrize("seed", range(4))
def test_leaks_are_those_of_comparing_all_pairs(seed):
    texts = corpus(seed + 10, 180)
    train, dev, test = ([{"text": text} for text in part] for part in (texts[:100], texts[100:140], texts[140:]))
    pieces = [shingles(text) for text in texts]
    expected = {(("dev", i - 100) if i < 140 else ("test", i - 140)) for i in range(100, 180)
                if any(jaccard(pieces[i], pieces[j]) >= 0.8 for j in range(100 if i < 140 else 140))}
    found = leaks(train, dev, test)
    assert {(leak.split, leak.row) for leak in found.found} == expected and len(found.found) == len(expected) > 5
    starts = {"train": 0, "dev": 100, "test": 140}
    for leak in found.found:
        a, b = starts[leak.split] + leak.row, starts[leak.of_split] + leak.of_row
        assert leak.similarity == jaccard(pieces[a], pieces[b]) >= 0.8
        assert (leak.kind == "exact") == (texts[a] == texts[b])
    assert 0 < found.comparisons < 80 * 140


def test_the_bundled_dialogues_do_not_leak():
    splits = {name: [json.loads(line) for line in (ROOT / f"data/customer_service/{name}.jsonl").read_text(encoding="utf-8").splitlines()]
              for name in ("train", "dev", "test")}
    assert leaks(**splits).found == []
    assert near_duplicates([row_text(row) for rows in splits.values() for row in rows]).groups == []
    splits["dev"].append(splits["train"][17])
    assert [(leak.row, leak.of_row, leak.kind) for leak in leaks(**splits).found] == [(32, 17, "exact"), (32, 17, "id")]


@pytest.mark.parametrize("texts", [
    ["Where is my order 12345678?", "where is my order 99?"], ["My order MW204518 is late", "My order MW204519 is late"],
    ["我的订单204518什么时候到", "我的订单９９什么时候到"], ["第1题", "第12题"],
])
def test_texts_that_differ_in_a_number_are_near_duplicates_but_not_the_same(texts):
    found = near_duplicates(texts)
    assert found.exact == [] and found.groups == [[0, 1]]
    [leak] = leaks([{"text": texts[0]}], [{"text": texts[1]}], []).found
    assert (leak.row, leak.of_row, leak.kind, leak.similarity) == (0, 0, "near", 1.0)


def test_very_short_texts_that_differ_are_not_near():
    texts = ["好", "好的", "是", "不是", "hi", "hi!", "ok", "no", "👍", "👎", "退款", "退货"]
    assert near_duplicates(texts).groups == []
    assert near_duplicates([*texts, "OK", "好 "]).groups == [[0, 13], [6, 12]]


def test_texts_are_looked_up_and_not_kept():
    rows = [{"text": f"{ENGLISH} {word}"} for word in ("a", "b", "a")]
    texts = Texts(rows)
    assert len(texts) == 3 and texts[1] == row_text(rows[1]) and near_duplicates(texts) == near_duplicates([texts[i] for i in range(3)])
