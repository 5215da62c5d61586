"""The data doctor: every finding has a data set that must raise it and one that must not; figures against counts made by hand."""

import json
import math
import random
import re

import pytest
from conftest import DIALOGUES, ROOT, tiny_tokenizer

from recipes.common import chat, duplicates
from recipes.common.doctor import (
    LOOKED_AT,
    REMEDIES,
    Finding,
    Split,
    balance,
    bars,
    brief,
    examine,
    flaws,
    histogram,
    labels_of,
    language_mix,
    length_summary,
    rendered,
    report,
    verdict,
)

QUESTIONS = ["Where is my parcel? It should have been here on Monday.", "Can I still change the address of delivery?",
             "我的退款什么时候到账？", "The lamp I bought last week no longer works.", "请问这件衬衫还有大号的吗？",
              "Do you open on Sundays as well?"]


def dialogue(question: str, answer: str = "One moment, please.", **columns) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


def split(rows: list[dict], first: int = 1, lengths=None, supervised=None) -> Split:
    return Split(rows, range(first, first + len(rows)), lengths or [20] * len(rows), supervised or [8] * len(rows))


def healthy() -> dict[str, Split]:
    rows = [dialogue(question) for question in QUESTIONS]
    return {"train": split(rows[:4]), "dev": split(rows[4:5]), "test": split(rows[5:])}


def codes(splits: dict[str, Split], max_length: int = 100, **options) -> dict[tuple, tuple]:
    """(code, split) -> (severity, rows, count) of what is found."""
    _, findings = examine(splits, max_length, **options)
    return {(f.code, f.split): (f.severity, f.rows, f.count) for f in findings}


# Findings


def test_healthy_data_has_no_finding():
    assert codes(healthy()) == {}
    summary, _ = examine(healthy(), 100)
    assert [split["languages"] for split in summary["splits"].values()] == [{"en": 3, "mixed": 1}, {"zh": 1}, {"en": 1}]


def test_rows_that_are_too_long():
    splits = healthy() | {"train": split([dialogue(q) for q in QUESTIONS[:4]], 11, [100, 101, 7, 300], [8, 8, 8, 0])}
    assert codes(splits) == {("shortened", "train"): ("warning", [12], 1), ("left-out", "train"): ("warning", [14], 1)}
    assert codes(splits, max_length=299) == {("left-out", "train"): ("warning", [14], 1)}
    summary, findings = examine(splits, 100)
    assert next(f.sentence for f in findings if f.code == "shortened") == (
        "1 of 4 rows in train exceed --max_length 100 and are shortened; 300 keeps 95 % whole, 300 keeps 99 %, 300 all")
    assert ("  --max_length 100: 1 shortened, 1 with nothing trained on; kept whole 95 % by 300, 99 % by 300, 100 % by 300\n"
            ) in report(summary, findings)


def test_rows_without_a_trained_token():
    splits = healthy() | {"dev": split([dialogue(q) for q in QUESTIONS[4:5]], 3, supervised=[0])}
    assert codes(splits) == {("nothing-trained", "dev"): ("warning", [3], 1)}


def test_rows_that_hold_several_items():
    row = dialogue(QUESTIONS[0])
    items = [{"text": q, "label": "ab"[i % 2]} for i, q in enumerate(QUESTIONS[:5] * 2)]
    one = Split([row], [7], [20] * 8 + [120, 20], [1] * 9 + [None], items, [7] * 10, "labelled turns", "labels")
    assert codes({"train": one}) == {("shortened", "train"): ("warning", [7], 1), ("rare-label", "train"): ("warning", [7], 1)}
    summary, findings = examine({"train": one}, 100)
    assert summary["splits"]["train"]["labels"]["label"]["counts"] == {"a": 5, "b": 4}, "the last one is out of scope"
    assert "train: 10 labelled turns in 1 row, 300 tokens, 9 labels trained on\n" in report(summary, findings)


def test_the_same_text_with_two_labels():
    rows = [{"text": q, "label": 1} for q in QUESTIONS] + [{"text": QUESTIONS[2] + " ", "label": 2}]
    assert codes({"train": split(rows, 3)})["conflict", "train"] == ("warning", [5, 9], 1)
    rows[-1]["label"] = 1
    assert ("conflict", "train") not in codes({"train": split(rows, 3)})


def test_rare_labels_of_train():
    rows = [{"text": f"{QUESTIONS[i % 6]} {'abcdefghij'[i] * 5}", "label": "common" if i < 6 else "rare"} for i in range(10)]
    assert codes({"train": split(rows, 2)}, threshold=1) == {("rare-label", "train"): ("warning", [8, 9, 10, 11], 1)}
    assert codes({"train": split(rows + [{"text": "one more", "label": "rare"}])}, threshold=1) == {}
    assert codes({"dev": split(rows)}, threshold=1) == {}, "only train is learned from"


def test_a_label_counts_once_a_row():
    row = dialogue(QUESTIONS[0])
    row["messages"][0]["intent"] = "status"
    row["messages"] += row["messages"] * 4
    assert codes({"train": split([row])}) == {}, "an annotation is not what the chat task learns"
    row["label"] = ["a"] * 7
    assert codes({"train": split([row, row])})["rare-label", "train"] == ("warning", [1, 2], 1)
    assert balance([row])["intent"] == {"counts": {"status": 5}, "entropy": 0.0, "most": 0.0, "rare": {"status": 1}}


def test_a_single_label():
    rows = [{"text": q, "label": 1} for q in QUESTIONS]
    assert codes({"train": split(rows)}) == {("one-label", "train"): ("warning", [], 1)}
    assert math.copysign(1, balance(rows)["label"]["entropy"]) == 1, "0, not -0"


def test_labels_that_train_does_not_have():
    train = [{"text": q, "label": "ab"[i % 2]} for i, q in enumerate(q + end for q in QUESTIONS for end in ("", " Thank you very much!"))]
    splits = {"train": split(train), "test": split([{"text": "New!", "label": "c"}, {"text": "Old.", "label": "a"}], 5)}
    assert codes(splits, threshold=1) == {("unseen-label", "test"): ("warning", [5], 1)}
    splits["test"] = split([{"text": "New!", "label": "b"}])
    assert codes(splits, threshold=1) == {}


@pytest.mark.parametrize("tags, found", [
    (["B-city", "I-date"], "I-date after B-city"), (["O", "I-date"], "I-date after O"), (["I-date", "I-date"], "I-date after the start"),
    (["I-city", "I-date"], "I-city after the start, I-date after I-city"), (["B-date", "I-date"], None), (["B-city", "B-date"], None)])
def test_tags_that_continue_no_span_of_their_type(tags, found):
    rows = [{"tokens": ["at", *question.split()[:2]], "tags": ["B-city", "I-city", "O"]} for question in QUESTIONS[:2]]
    rows.append({"tokens": ["on", "Friday"], "tags": tags})
    summary, findings = examine({"dev": split(rows, 4)}, 100)
    count = found.count("after") if found else 0
    assert [(f.severity, f.code, f.rows, f.count) for f in findings] == [("warning", "stray-tag", [6], count)] * bool(found)
    assert summary["splits"]["dev"]["stray_tags"] == count
    if found:
        said = "1 tag I-... continues" if count == 1 else f"{count} tags I-... continue"
        assert findings[0].sentence == f"{said} no span of the type in dev, so each begins one of its own: {found}"
        assert "(row 6); give the first word of each span a B- tag" in verdict(findings)[0]
    shown = Split(rows, range(3), [9] * 3, [2] * 3, learned=("label",))
    assert examine({"dev": shown}, 100)[1] == [], "tags that no task learns"


def test_a_language_that_the_text_is_not_in():
    rows = [dialogue("我的包裹在哪里？", "请稍等", language="en"), dialogue("你好，在吗", "在的", language="zh"),
            dialogue("Où est mon colis ?", language="fr")]
    assert codes({"train": split(rows)}) == {("language", "train"): ("warning", [1], 1)}


def test_duplicates_within_a_split():
    long = "I ordered a coffee grinder two weeks ago and it still has not arrived, so where is it?"
    rows = [dialogue(long), dialogue(QUESTIONS[1]), dialogue(long.upper()), dialogue(long + " Thanks!")]
    assert codes({"train": split(rows, 4)}) == {
        ("duplicate", "train"): ("warning", [6], 1), ("near-duplicate", "train"): ("warning", [7], 1)}
    summary, _ = examine({"train": split(rows, 4)}, 100)
    figures = summary["splits"]["train"]["duplicates"]
    assert (figures["exact"], figures["near"], figures["groups"]) == (1, 1, [[4, 6, 7]]) and figures["comparisons"] > 0


def test_leaks():
    long = "I ordered a coffee grinder two weeks ago and it still has not arrived, so where is it?"
    splits = {"train": split([dialogue(long), dialogue(QUESTIONS[1], id="a")], 1), "dev": split([dialogue(QUESTIONS[3], id="a")], 7),
              "test": split([dialogue(QUESTIONS[2]), dialogue(long), dialogue(long + " Thanks!")], 3)}
    found = codes(splits)
    assert found.pop(("near-duplicate", "test")) == ("warning", [5], 1)
    assert found == {("leak-exact", "test"): ("warning", [4], 1), ("leak-near", "test"): ("warning", [5], 1),
                     ("leak-id", "dev"): ("warning", [7], 1)}
    summary, findings = examine(splits, 100)
    assert [(leak["split"], leak["row"], leak["of_split"], leak["of_row"], leak["kind"]) for leak in summary["leaks"]["found"]] == [
        ("dev", 7, "train", 2, "id"), ("test", 4, "train", 1, "exact"), ("test", 5, "train", 1, "near")]
    assert next(f.sentence for f in findings if f.code == "leak-exact") == (
        "1 of 3 rows in test stand word for word in train, so scores on test are too good; for example, row 4 of test and row 1 of train")


def test_what_was_not_compared_is_told(monkeypatch):
    rng = random.Random(0)
    rows = [{"text": QUESTIONS[0] + QUESTIONS[1] + "".join(rng.choices("abcdefgh", k=60))} for _ in range(200)]
    assert codes({"train": split(rows)}) == {}
    monkeypatch.setattr(duplicates, "MOST_COMPARED", 3)
    assert codes({"train": split(rows)})["not-compared", "train"][0] == "info"


def test_personal_data_by_kind_with_rows_and_without_the_values():
    values = ["jo@example.com", "13812345678", "MW204518", "6200000000000005", "11010519491231002X"]
    rows = [dialogue(QUESTIONS[0]), dialogue(f"我是{values[0]}和{values[0]}，手机{values[1]}", f"订单{values[2]}"),
            dialogue(f"卡{values[3]}", "We have blocked it."),
            {"messages": [{"role": "system", "content": f"身份证{values[4]}"}, *dialogue("在吗？")["messages"]]}]
    assert codes({"train": split(rows, 2)}) == {
        ("personal-email", "train"): ("warning", [3], 1), ("personal-phone", "train"): ("warning", [3], 1),
        ("personal-order", "train"): ("info", [3], 1), ("personal-bank-card", "train"): ("warning", [4], 1),
        ("personal-id-card", "train"): ("warning", [5], 1)}
    summary, findings = examine({"train": split(rows, 2)}, 100)
    assert summary["splits"]["train"]["personal_data"]["EMAIL"] == {"places": 2, "rows": [3]}
    shown = json.dumps(summary, ensure_ascii=False) + report(summary, findings)
    assert not [value for value in values if value in shown], "a report is pasted into tickets and logs"
    assert ("personal-order", "train") not in codes({"train": split(rows, 2)}, orders=[])


@pytest.mark.parametrize("row", [
    {"text": "mail jo@example.com"}, {"source": "Hi", "target": "jo@example.com"}, {"tokens": ["jo@example.com"]},
])
def test_personal_data_in_rows_of_other_tasks(row):
    assert codes({"train": split([row])}) == {("personal-email", "train"): ("warning", [1], 1)}


def test_errors_come_first_and_all_is_json():
    splits = healthy() | {"test": split([dialogue(QUESTIONS[0]), dialogue("Mail jo@example.com")], supervised=[0, 4], lengths=[400, 9])}
    summary, findings = examine(splits, 100)
    assert [f.severity for f in findings] == ["warning"] * 3
    assert json.loads(json.dumps(summary)) == summary and len(summary["findings"]) == 3
    assert summary["findings"][0].keys() == {"severity", "code", "sentence", "rows", "count", "split", "remedy"}
    assert {f.sentence.split()[0] for f in findings} == {str(f.count) for f in findings}
    more = Finding("error", "bad-row", "2 rows are bad", [3, 4], 2, "train")
    assert examine(splits, 100, found=[more])[1] == [more, *findings]


@pytest.mark.parametrize("broken", [
    Split([dialogue("Hi")], [1], [5], []), Split([dialogue("Hi")], [1, 2], [5], [2]), Split([dialogue("Hi")], [1], [5, 6], [2]),
    Split([], [], [], []),
])
def test_lists_that_do_not_fit_are_refused(broken):
    with pytest.raises(ValueError, match=r"^dev: \[.*\] rows, row numbers, lengths and supervised counts"):
        examine(healthy() | {"dev": broken}, 100)


# Figures


def test_length_summary_by_hand():
    lengths = list(range(1, 101))
    random.Random(0).shuffle(lengths)
    figures = length_summary(lengths, 90)
    assert figures.pop("histogram") == histogram(lengths)
    assert figures == {"total": 5050, "shortest": 1, "median": 50.5, "mean": 50.5, "longest": 100, "over": 10,
                       "keeps": {"95": 95, "99": 99, "100": 100}}
    assert length_summary([7], 7)["over"] == 0 and length_summary([7], 6)["over"] == 1
    assert length_summary([3, 1, 2], 9)["median"] == 2
    with pytest.raises(ValueError, match="no lengths"):
        length_summary([], 9)


@pytest.mark.parametrize("seed", range(5))
def test_keeps_is_the_smallest_length_that_keeps_so_many(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 50) for _ in range(rng.randint(1, 60))]
    for percent, value in length_summary(lengths, 10)["keeps"].items():
        kept = [100 * sum(length <= limit for length in lengths) / len(lengths) for limit in (value - 1, value)]
        assert kept[0] < int(percent) <= kept[1]


@pytest.mark.parametrize("lengths", [[0], [1], [9, 10, 11], [99], [100], [1, 768, 300], [12345, 3], [10**6]])
def test_bins_hold_every_length_once(lengths):
    bins = histogram(lengths)
    assert 1 <= len(bins) <= 10 and bins[0]["from"] == 0 and bins[-1]["from"] <= max(lengths) <= bins[-1]["to"]
    for b, after in zip(bins, bins[1:], strict=False):
        assert after["from"] == b["to"] + 1
    for b in bins:
        assert b["rows"] == sum(b["from"] <= length <= b["to"] for length in lengths)
        assert re.fullmatch("[125]0*", str(b["to"] - b["from"] + 1))


def test_bars_are_proportional_and_never_hide_a_row():
    assert bars(histogram([5] * 2000 + [15] * 1000 + [35])) == [
        "   5 -  9  2,000 " + "█" * 40, "  10 - 14      0", "  15 - 19  1,000 " + "█" * 20, "  20 - 24      0",
        "  25 - 29      0", "  30 - 34      0", "  35 - 39      1 ▏"]


def test_balance_by_hand():
    rows = [{"label": "a"}] * 4 + [{"label": "b"}] * 2 + [{"label": "c"}] * 2
    assert balance(rows) == {"label": {
        "counts": {"a": 4, "b": 2, "c": 2}, "entropy": 1.5, "most": math.log2(3), "rare": {"b": 2, "c": 2, "a": 4}}}
    assert balance([{"text": "no label"}]) == {}


def test_labels_of_all_tasks():
    assert labels_of({"text": "x", "label": 3}) == {"label": ["3"]}
    assert labels_of({"text": "x", "label": True}) == {"label": ["true"]}
    assert labels_of({"tokens": ["x", "y"], "tags": ["O", "B-LOC"]}) == {"tags": ["O", "B-LOC"]}
    turns = [{"role": "user", "content": "x", "intent": "a", "sentiment": "b"}, {"role": "assistant", "content": "y", "action": "c"},
             {"role": "user", "content": "z", "intent": "d"}]
    assert labels_of({"messages": turns}) == {"intent": ["a", "d"], "sentiment": ["b"], "action": ["c"]}


@pytest.mark.parametrize("text, mix", [
    ("Where is my order?", "en"), ("我的订单在哪里？", "zh"), ("我的iPhone 15 Pro什么时候能发货，请问能帮我查一下吗？", "zh"),
    ("Please send it to 王 at the old address", "en"), ("Where is my order? 我的订单在哪里？", "mixed"),
    ("Привет, где мой заказ?", "other"),
    ("注文した商品はいつ届きますか", "other"), ("주문 어디에 있나요", "other"), ("12345 !?", "other"), ("👍", "other"),
    ("Où est déjà le café", "en"),
])
def test_the_language_mix(text, mix):
    assert language_mix(text) == mix


# The terminal


def test_a_histogram_of_one_row_of_equal_ones_and_on_a_narrow_screen():
    assert bars(histogram([37])) == ["  35 - 39  1 " + "█" * 40]
    assert bars(histogram([8] * 5)) == ["  8 - 8  5 " + "█" * 40]
    assert bars(histogram([0, 0])) == ["  0 - 0  2 " + "█" * 40]
    lengths = [random.Random(0).randint(1, 12_000) for _ in range(100)] + [90] * 123_456
    assert max(map(len, bars(histogram(lengths), 40))) == 40 and max(map(len, bars(histogram(lengths), 10))) < 40
    for columns in (40, 80):
        summary, findings = examine(healthy() | {"dev": split([dialogue("Why?")])}, 100)
        text = report(summary, findings, columns=columns)
        assert max(len(line) for line in text.splitlines() if "█" in line) <= columns


def test_the_report_of_the_bundled_dialogues():
    splits = {}
    for name in ("train", "dev", "test"):
        lines = (ROOT / f"data/customer_service/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        lengths = [sum(len(turn["content"]) for turn in row["messages"]) for row in rows]
        splits[name] = Split(rows, range(1, len(rows) + 1), lengths, lengths)
    summary, findings = examine(splits, 10_000)
    assert not [f for f in findings if f.severity == "error" or f.code == "language"]
    text = report(summary, findings)
    assert "\033" not in text and text.splitlines()[-1].startswith("errors: 0, warnings: ")
    assert "train: 260 rows, " in text and "  languages: en 130, zh 130\n" in text and "leaks between splits: none found\n" in text
    assert "  intent: 45 labels, entropy " in text and ": inform 266, ask_followup 191, " in text and " and 39 more\n" in text
    assert ("warning: 4 of 260 rows in train hold e-mail addresses, which a model may learn and repeat (rows 98, 106, 116, 231); "
            "--mask_pii OUT writes a copy with placeholders in their place [personal-email]\n") in text
    assert "\033[33mwarning\033[0m: " in report(summary, findings, colour=True)


@pytest.mark.parametrize("kind", ["gpt2", "chatml"])
@pytest.mark.parametrize("row", DIALOGUES)
def test_rendered_shows_what_is_trained_on(kind, row):
    tokenizer = tiny_tokenizer(kind)
    chat.prepare(tokenizer)
    encoded = chat.encode(row["messages"], tokenizer, 10_000)
    whole = tokenizer.decode(encoded.input_ids, skip_special_tokens=False)
    plain = rendered(tokenizer, encoded.input_ids, encoded.labels, colour=False)
    trained = re.findall("⟦(.*?)⟧", plain, flags=re.DOTALL)
    assert re.sub("[⟦⟧]", "", plain) == whole
    assert [text.strip() for text in trained] == [m["content"] + tokenizer.eos_token for m in row["messages"] if m["role"] == "assistant"]
    coloured = rendered(tokenizer, encoded.input_ids, encoded.labels)
    assert coloured == plain.replace("⟦", "\033[32m").replace("⟧", "\033[0m")


def test_rendered_never_breaks_a_character():
    tokenizer = tiny_tokenizer("gpt2")
    ids = tokenizer("a\u9f98b")["input_ids"]  # not in the vocabulary: three tokens, one for each byte
    assert len(ids) == 5
    for border in range(6):
        shown = rendered(tokenizer, ids, [chat.IGNORE] * border + ids[border:], colour=False)
        assert shown.replace("⟦", "").replace("⟧", "") == "a\u9f98b"
        assert shown == {0: "⟦a龘b⟧", 1: "a⟦龘b⟧", 2: "a⟦龘b⟧", 3: "a⟦龘b⟧", 4: "a龘⟦b⟧", 5: "a龘b"}[border]


def test_rendered_with_lists_that_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 input_ids but 1 labels"):
        rendered(tiny_tokenizer("gpt2"), [1, 2], [1])
    assert rendered(tiny_tokenizer("gpt2"), [], []) == ""


def test_every_code_has_a_remedy():
    source = (ROOT / "recipes/common/doctor.py").read_text(encoding="utf-8") + (ROOT / "scripts/doctor.py").read_text(encoding="utf-8")
    written = set(re.findall(r'Finding\("(?:error|warning|info)", "([a-z-]+)"', source))
    assert written and written <= REMEDIES.keys()
    assert verdict([Finding("info", "not-compared", "3 times", [], 3, "dev")])[0] == "info: 3 times [not-compared]"
    with pytest.raises(KeyError):
        verdict([Finding("info", "no-such-code", "3 times", [], 3, "dev")])


# What is trained on


def test_an_answer_without_its_end():
    tokenizer = tiny_tokenizer("chatml")
    for row in DIALOGUES:
        encoded = chat.encode(row["messages"], tokenizer, 10_000)
        end = chat.end_of_turn_id(tokenizer)
        assert flaws(encoded.input_ids, encoded.labels, end, None) == set()
        last = max(t for t, label in enumerate(encoded.labels) if label == end)
        broken = [chat.IGNORE if t == last else label for t, label in enumerate(encoded.labels)]
        assert flaws(encoded.input_ids, broken, end, None) == {"no-end"}
        assert flaws(encoded.input_ids[:-2], encoded.labels[:-2], end, None) == {"no-end"}, "cut at the end"


def test_a_second_first_token():
    assert flaws([1, 5, 1], [-100, 5, 2], 2, 1) == set()
    assert flaws([1, 1, 5, 2], [-100, -100, 5, 2], 2, 1) == {"double-bos"}


# Before every training


def test_nothing_to_tell_of_healthy_data():
    counts, sentences = brief(healthy()["train"].rows, healthy()["dev"].rows, {"a": 9, "b": 9})
    assert sentences == []
    assert counts == {"duplicates": 0, "leaks": 0, "labels": {"most_frequent": "a", "share": 0.5, "rare": 0}, "personal_data": {
        "train": {"looked_at": 4, "rows": {}}, "dev": {"looked_at": 1, "rows": {}}}}


def test_what_is_told_before_a_training():
    train = [dialogue(q) for q in QUESTIONS[:4]] + [dialogue(QUESTIONS[0].upper()), dialogue("Mail jo@example.com or jo@example.com")]
    dev = [dialogue(QUESTIONS[1]), dialogue(QUESTIONS[5])]
    counts, sentences = brief(train, dev, {"a": 950, "b": 46, "c": 4})
    assert sentences == [
        "1 of 6 train rows repeat an earlier one word for word",
        "1 of 2 dev rows stand in train word for word, so dev scores are too good",
        "personal data (6 train rows looked at): e-mail addresses in 1",
        "95% of the train labels are a, so always saying that would score as much",
        "1 of 3 labels occur fewer than 5 times in train: c"]
    assert (counts["duplicates"], counts["leaks"], counts["personal_data"]["train"]) == (1, 1, {"looked_at": 6, "rows": {"EMAIL": 1}})
    counts, sentences = brief(train, dev, repeated=True)
    assert counts["duplicates"] is None and "repeat" not in sentences[0], "weights repeat rows on purpose"
    assert "labels" not in counts


def test_the_search_before_a_training_is_bounded():
    counts, _ = brief([dialogue(f"Mail jo{i}@example.com") for i in range(10 * LOOKED_AT + 1)], [])
    looked_at = counts["personal_data"]["train"]["looked_at"]
    assert LOOKED_AT / 2 < looked_at <= LOOKED_AT and counts["personal_data"]["train"]["rows"] == {"EMAIL": looked_at}
    assert counts["personal_data"]["dev"] == {"looked_at": 0, "rows": {}}
