"""Altered copies: what changes, what never does, what is dropped and counted, what is refused.

    python -m pytest tests/test_augment.py
"""

import functools
import importlib.util
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML, ROOT, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import REFUSED, call, refused
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration, set_seed

from recipes.common import augment, data

NOTHING = augment.protection([])
SCRIPT = "scripts/augment.py"
ENGLISH = "Please tell me whether order MW204518 was shipped on Friday, because I am not happy with the $49 kettle from 10:30."
CHINESE = "请问我的订单MW204518什么时候到，我不想要这个49元的水壶了，能退货吗？"
DIALOGUES = [
    {"id": "en-1", "language": "en", "messages": [
        {"role": "system", "content": "You answer for the shop Maplewood."},
        {"role": "user", "content": "Good morning, where is my parcel with the walnut coat rack?", "intent": "order_status"},
        {"role": "assistant", "content": "Please tell me the order number of your parcel with the walnut coat rack."},
        {"role": "user", "content": "The number is MW204518 and it was not delivered to my address."},
        {"role": "assistant", "content": "Thank you, it arrives tomorrow.", "train": False},
        {"role": "assistant", "content": "Anything else that I can do for you today?"}]},
    {"id": "zh-1", "language": "zh", "messages": [
        {"role": "user", "content": "你好，我想问一下包裹什么时候能送到家里"},
        {"role": "assistant", "content": "请告诉我您的订单号，我马上查询。"},
        {"role": "user", "content": "订单号是MW585501，东西还没有收到"}, {"role": "assistant", "content": "明天送到。"}]},
]
LABELS = [{"text": "Where can I see the balance of my savings account?", "label": "balance"},
          {"text": "我的银行卡昨天在商场里丢了怎么办", "label": "lost_card"}]
TAGS = [{"tokens": ["please", "book", "tables", "at", "Golden", "Dragon", "for", "4", "hungry", "people", "not", "tonight"],
         "tags": ["O", "O", "O", "O", "B-name", "I-name", "O", "O", "O", "O", "O", "O"]}]
PAIRS = [{"source": "The weather is lovely in the mountains today.", "target": "今天山里天气很好。"}]


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def copies_of(path):
    return [row for row in rows_of(path) if "augmented" in row]


def users(row):
    return [turn["content"] for turn in row["messages"] if turn["role"] == "user"]


# The operations


LEXICON = {"please": ["kindly", "just"], "happy": ["content"], "kettle": ["pot"], "kettles": ["pots"], "friday": ["workday"],
           "不想": ["很想"], "退货": ["退还商品"], "什么": ["啥"], "订单": ["单子", "单"], "水壶": ["壶"]}
OPERATIONS = {
    "swap": lambda text, rng: augment.swap(text, NOTHING, rng, 0.3),
    "delete": lambda text, rng: augment.delete(text, NOTHING, rng, 0.3),
    "noise": lambda text, rng: augment.noise(text, NOTHING, rng, 0.3),
    "synonym": lambda text, rng: augment.synonym(text, NOTHING, rng, 0.3, LEXICON),
    "variant": lambda text, rng: augment.variant([text], NOTHING, rng)[0],
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_an_operation_changes_words_and_no_facts(name, text):
    results = [OPERATIONS[name](text, random.Random(seed)) for seed in range(60)]
    if name == "variant" and text == ENGLISH:
        assert set(results) == {text}
        return
    assert len(set(results) - {text}) >= (2 if name in ("variant", "synonym") else 20)
    for result in results:
        for fact in ("MW204518", "49", *(["$49", "10:30", "Friday", "not happy"] if text == ENGLISH else [])):
            assert fact in result, result
        assert text == ENGLISH or re.search("不想", result)  # the negation and the character after it
    assert results == [OPERATIONS[name](text, random.Random(seed)) for seed in range(60)]


PIECES = ("I you please parcel with kettle happy order arrived late notice another walnut don't can't shouldn’t dont no not never none "
          "nothing neither nor without cannot Never NOT $49 49.90 10:30 MW204518 A-17/3 1,000 3rd 50% a@b.co {{name}} <b> food[Thai] "
          "我 你 请 包裹 订单 东西 收到 水壶 别的 特别 上午 号码 商城 不 没 沒 别 無 未 非 无 勿 不要 没有 MW585501 49元 三天 一百 第二 "
          "两 １２３ ２０２４年 ＭＷ１２３ ① ½ ， 。 ？").split()
MANY = LEXICON | {"another": ["no other"], "parcel": ["2 parcels"], "notice": ["not see"], "东西": ["无物", "物品"], "收到": ["没丢"]}
PROTECTED = augment.protection(["walnut", "商城"])
EVERY = {
    "swap": lambda text, rng: augment.swap(text, PROTECTED, rng, 0.6),
    "delete": lambda text, rng: augment.delete(text, PROTECTED, rng, 0.6),
    "noise": lambda text, rng: augment.noise(text, PROTECTED, rng, 0.9),
    "synonym": lambda text, rng: augment.synonym(text, PROTECTED, rng, 1, MANY),
    "variant": lambda text, rng: augment.variant([text], PROTECTED, rng)[0],
}
# Found on their own, and not as augment.py finds them.
KEPT = (re.compile(r"\d+|[①½]|[一三百两兩]"),
        re.compile(r"\{\{name}}|<b>|food\[Thai]|walnut|商城"),
        re.compile(r"n['’]t\b|(?<![a-z])(?:no|not|never|none|nothing|neither|nor|without|cannot|dont)(?![a-z])|[不没無别未非勿]", re.I))
SAME = str.maketrans("沒无別兩", "没無别两")


@settings(max_examples=120, deadline=None)
@given(words=st.lists(st.sampled_from(PIECES), min_size=1, max_size=14), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", EVERY)
def test_no_operation_alters_numbers_negations_slots_or_protected_words(name, words, seed):
    """Whatever a synonym of the user's own brings in is caught by `facts`, which drops the copy."""
    text = words[0]
    for word in words[1:]:  # blanks as one writes them: none beside a Chinese character
        text += word if re.search("[一-鿿，。？]", text[-1] + word[0]) else f" {word}"
    new = EVERY[name](text, random.Random(seed))
    same = all(Counter(kept.findall(text.translate(SAME))) == Counter(kept.findall(new.translate(SAME))) for kept in KEPT)
    assert same or (name == "synonym" and augment.facts(text, PROTECTED) != augment.facts(new, PROTECTED)), new


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.lists(st.sampled_from(PIECES), min_size=1, max_size=9)),
                      min_size=2, max_size=6), method=st.sampled_from(sorted(EVERY)), seed=st.integers(0, 9))
def test_only_what_the_user_says_is_altered(turns, method, seed):
    script = load_script(SCRIPT)
    row = {"messages": [{"role": role, "content": " ".join(words), "intent": "x"} for role, words in turns], "id": "a"}
    texts = script.alter(row, method, random.Random(seed), SimpleNamespace(protect=PROTECTED, share=0.5, lexicon=MANY))
    copy = script.copy_of(row, texts, 1, f"{method}-1", method)
    assert copy["augmented"] == {"from": "a", "method": method} and copy["id"] == f"a-{method}-1"
    for old, new in zip(row["messages"], copy["messages"], strict=True):
        assert new == old if old["role"] != "user" else new | {"content": ""} == old | {"content": ""}


@functools.cache
def load_script(name):
    spec = importlib.util.spec_from_file_location("augment_script", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_text_of_facts_alone_stays():
    assert augment.delete("Monday Tuesday Friday never July", NOTHING, random.Random(0), 0.5) == "Monday Tuesday Friday never July"


def test_swap_moves_words_and_loses_none():
    for seed in range(30):
        swapped = augment.swap("where is my big red parcel", NOTHING, random.Random(seed), 0.2)
        assert swapped != "where is my big red parcel" and Counter(swapped.split()) == Counter("where is my big red parcel".split())
    assert augment.swap("cats, dogs", NOTHING, random.Random(0), 1) == "cats, dogs"  # never across punctuation
    assert augment.swap("do not swap", NOTHING, random.Random(0), 1) == "do not swap"


def test_delete_keeps_three_words_and_tidies_the_gaps():
    assert augment.delete("just three words", NOTHING, random.Random(0), 1) == "just three words"
    for seed in range(30):
        shorter = augment.delete("where is my big red parcel, please?", NOTHING, random.Random(seed), 0.3)
        assert len(augment.WORD.findall(shorter)) == 5 and not re.search(r"  | [,?]|^ | $", shorter)
        assert len(augment.WORD.findall(augment.delete("one big red cat", NOTHING, random.Random(seed), 1))) == 3
        assert re.fullmatch(r"\D*49\D*", augment.delete("我想买49元的水壶", NOTHING, random.Random(seed), 0.2))


def test_noise_is_a_slip_within_a_word():
    allowed = {"kettle"[:at] + change + "kettle"[at + 1:] for at in range(1, 5)
               for change in ["", "kettle"[at] * 2, *augment._neighbours("kettle"[at])]}
    allowed |= {"ekttle", "ktetle", "kettle", "ketlte"}  # two letters exchanged
    found = {augment.noise("kettle", NOTHING, random.Random(seed), 1) for seed in range(300)}
    assert found <= allowed and len(found) > 15
    assert augment.noise("a cup", NOTHING, random.Random(0), 1) == "a cup"  # short words are left alone
    assert set(augment._neighbours("g")) == set("rtyfhvbn")


def test_noise_in_chinese_is_a_homophone():
    assert {"泰", "抬"} & set(augment.homophones("太")) and "太" not in augment.homophones("太")
    assert augment.homophones("A") == [] and len(sum(augment._by_sound().values(), [])) == 3755
    for seed in range(20):
        [new] = [b for a, b in zip("水壶", augment.noise("水壶", NOTHING, random.Random(seed), 0.5), strict=True) if a != b]
        assert new in augment.homophones("水") + augment.homophones("壶")


def test_synonyms_take_the_longest_match_and_the_case():
    def change(text, lexicon, share=1.0):
        return augment.synonym(text, NOTHING, random.Random(0), share, lexicon)

    assert change("Please, PLEASE buy a kettle.", {"please": ["kindly"], "kettle": ["pot"]}) == "Kindly, Kindly buy a pot."
    assert change("我的订单号错了", {"订单": ["单子"], "订单号": ["编号"], "号": ["码"]}) == "我的编号错了"
    assert change("pleased kettles", {"please": ["kindly"], "kettle": ["pot"]}) == "pleased kettles"  # whole words only
    assert change("我没有订单", {"有": ["存在"], "订单": ["单子"]}) == "我没有单子"
    assert change("anything", {}) == "anything" and change("", {"a": ["b"]}) == ""


def test_variants_of_chinese():
    results = {augment.variant(["请帮我发货,谢谢!"], NOTHING, random.Random(seed))[0] for seed in range(40)}
    assert results == {"請幫我發貨,謝謝!", "请帮我发货，谢谢！"}
    results = {augment.variant(["請幫我發貨，ＯＫ？３點"], NOTHING, random.Random(seed))[0] for seed in range(40)}
    assert results == {"请帮我发货，ＯＫ？３点", "請幫我發貨,OK?３點"}
    assert augment.variant(["没有汉字以外的，"], augment.protection(["没有"]), random.Random(1))[0].startswith("没有")
    whole = [tuple(augment.variant(["请发货", "谢谢您"], NOTHING, random.Random(seed))) for seed in range(20)]
    assert set(whole) == {("請發貨", "謝謝您")}


@pytest.mark.parametrize(("text", "kept"), [
    ("ring 555-0134 or +44 20", ["555-0134", "44", "20"]), ("at 10:30 for $1,200.50", ["10:30", "1,200.50"]), ("save 15%", ["15%"]),
    ("mail a.b@shop.example", ["a.b@shop.example"]), ("see https://shop.example/a?b=1 now", ["https://shop.example/a?b=1"]),
    ("dear {{Customer Name}}", ["{{customer name}}"]), ("order A-17/3", ["a-17/3"]), ("订单MW12和三百元", ["mw12", "三百"]),
    ("two of them on Monday", ["two", "monday"]), ("twofold stone", []),
    ("food[Thai], area[city centre]", ["food[thai]", "area[city centre]"]), ("買兩萬", ["两万"])])
def test_facts_are_found(text, kept):
    found = augment.facts(text, NOTHING)
    assert sorted(+found) == sorted(kept)


@pytest.mark.parametrize(("one", "other", "same"), [
    ("I did not order it", "I didn't order it", True), ("I did not order it", "I did order it", False),
    ("我没有收到", "我沒有收到", True), ("我没有收到", "我有收到", False), ("I know it", "I no it", False),
    ("two cups", "three cups", False), ("order 12", "order 21", False), ("I want Oak Tea", "I want oak tea", True),
    ("I want Oak Tea", "I want Tea Oak", False), ("Oakland tea", "Oakland", True)])
def test_a_changed_fact_is_noticed(one, other, same):
    protect = augment.protection(["Oak Tea", "oak"])
    assert (augment.facts(one, protect) == augment.facts(other, protect)) == same


def test_protected_words_are_not_free():
    text = "My Golden Dragon voucher, and golden dragons in iPhone手机壳"
    free = [word[0] for word in augment.free_words(text, augment.protection(["golden dragon", "iPhone", "手机"]))]
    assert free == ["My", "voucher", "and", "golden", "dragons", "in", "壳"]


def test_what_a_number_counts_is_not_free():
    text = "票价50-100元，0.2小时，评分4分以上，三点钟，手机号"
    free = "".join(word[0] for word in augment.free_words(text, augment.protection(["手机"])))
    assert free == "票价评分以上号"


# The command


def test_dialogues(write_jsonl, tmp_path):
    path, out = write_jsonl(DIALOGUES), tmp_path / "new" / "train.jsonl"
    result = call(SCRIPT, "--data", path, "--out", out, "--methods", "swap,delete,noise,variant", "--per_row", "2", "--share", "0.3")
    assert result.code == 0, result.err
    rows = rows_of(out)
    copies = copies_of(out)
    assert rows[:2] == DIALOGUES and len(rows) == 2 + len(copies) and len(copies) >= 10
    assert [path.name for path in out.parent.iterdir()] == ["train.jsonl"]
    originals = {row["id"]: row for row in DIALOGUES}
    for copy in copies:
        row = originals[copy["augmented"]["from"]]
        assert copy["augmented"]["method"] in ("swap", "delete", "noise", "variant") and copy["language"] == row["language"]
        assert users(copy) != users(row) and data.check_dialogue(copy) is None
        for old, new in zip(row["messages"], copy["messages"], strict=True):
            assert {**old, "content": ""} == {**new, "content": ""}
            assert old["role"] == "user" or old == new  # the system turn and the assistant's stay
        assert ("MW204518" if row["id"] == "en-1" else "MW585501") in users(copy)[1]
    assert len({json.dumps(users(row), ensure_ascii=False) for row in rows}) == len(rows)
    assert len({row["id"] for row in rows}) == len(rows)
    counted = [int(n) for n in re.findall(r"copy \d: (\d+) rows? added", result.out)]
    dropped = [int(n) for n in re.findall(r": (\d+) cop(?:y|ies) dropped", result.out)]
    assert sum(counted) == len(copies) and sum(counted) + sum(dropped) == 2 * 4 * 2
    assert f"wrote {out}: 2 rows and {len(copies)} copies" in result.out
    assert f"lay a dev file of other rows beside it, such as {out.parent / 'dev.jsonl'}" in result.out


def test_labels_pairs_and_tags(write_jsonl, tmp_path):
    out = tmp_path / "out.jsonl"
    assert call(SCRIPT, "--data", write_jsonl(LABELS + PAIRS), "--out", out, "--methods", "swap,noise").code == 0
    copies = copies_of(out)
    assert {copy["augmented"]["from"] for copy in copies} == {1, 2, 3}
    for copy in copies:
        row = (LABELS + PAIRS)[copy["augmented"]["from"] - 1]
        name = "source" if "source" in row else "text"
        assert copy[name] != row[name] and {**copy, name: "", "augmented": 0} == {**row, name: "", "augmented": 0}


def test_tags_stay_in_line(write_jsonl, tmp_path):
    lines = ["hungry\tstarving", "tables\tplaces to sit\tdesks", "golden\tshiny", "tonight\tlater"]
    words, path, out = write_jsonl(lines, "words.tsv"), write_jsonl(TAGS), tmp_path / "out.jsonl"
    result = call(SCRIPT, "--data", path, "--out", out, "--methods", "synonym,noise", "--synonyms", words, "--per_row", "8",
                  "--share", "0.5")
    assert result.code == 0, result.err
    copies = copies_of(out)
    assert len(copies) >= 8 and {"starving", "desks"} <= {token for copy in copies for token in copy["tokens"]}
    for copy in copies:
        assert copy["tags"] == TAGS[0]["tags"] and len(copy["tokens"]) == len(copy["tags"])
        assert copy["tokens"][4:6] == ["Golden", "Dragon"] and copy["tokens"][7] == "4" and copy["tokens"][10:] == ["not", "tonight"]
        assert all(len(token.split()) == 1 for token in copy["tokens"])
    refused(call(SCRIPT, "--data", path, "--out", tmp_path / "b.jsonl", "--methods", "noise,swap"), "--methods swap would break the pairs")


def test_the_seed_decides(write_jsonl, tmp_path):
    path = write_jsonl(DIALOGUES + LABELS)
    texts = []
    for i, seed in enumerate((1, 1, 2)):
        assert call(SCRIPT, "--data", path, "--out", tmp_path / f"{i}.jsonl", "--seed", seed).code == 0
        texts.append((tmp_path / f"{i}.jsonl").read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_protected_words_stay(write_jsonl, tmp_path):
    names = write_jsonl(["walnut", "coat rack", ""], "names.txt")
    out = tmp_path / "out.jsonl"
    path = write_jsonl(DIALOGUES)
    assert call(SCRIPT, "--data", path, "--out", out, "--per_row", "5", "--share", "0.6", "--protect", names, "parcel", "包裹").code == 0
    for copy in copies_of(out):
        first = users(copy)[0]
        assert "包裹" in first if copy["augmented"]["from"] == "zh-1" else all(word in first for word in ("walnut", "coat rack", "parcel"))


def test_near_copies_and_repeats_are_dropped_and_counted(write_jsonl, tmp_path):
    path = write_jsonl(LABELS[:1])
    for limit, expected in (("0.5", 0), ("1", 1)):
        result = call(SCRIPT, "--data", path, "--out", tmp_path / f"{limit}.jsonl", "--methods", "noise", "--max_similarity", limit)
        assert len(copies_of(tmp_path / f"{limit}.jsonl")) == expected
        assert ("noise: 1 copy dropped: more similar than 0.5" in result.out) == (expected == 0)
    words = write_jsonl(["cats\tdogs"], "words.tsv")
    path = write_jsonl([{"text": "I like cats", "label": "a"}, {"text": "I like dogs", "label": "b"}])
    result = call(SCRIPT, "--data", path, "--out", tmp_path / "c.jsonl", "--methods", "synonym", "--synonyms", words)
    assert copies_of(tmp_path / "c.jsonl") == []
    assert "1 copy dropped: equal to another row" in result.out and "1 copy dropped: nothing in the row could be altered" in result.out


def test_copies_are_not_copied_and_a_language_can_be_chosen(write_jsonl, tmp_path):
    first = tmp_path / "first.jsonl"
    assert call(SCRIPT, "--data", write_jsonl(DIALOGUES + LABELS), "--out", first, "--language", "zh", "--methods", "swap").code == 0
    assert [copy["augmented"]["from"] for copy in copies_of(first)] == ["zh-1", 4]
    result = call(SCRIPT, "--data", first, "--out", tmp_path / "second.jsonl", "--language", "zh", "--methods", "delete")
    assert result.code == 0 and "2 of 6 rows are altered" in result.out
    assert [copy["augmented"]["method"] for copy in copies_of(tmp_path / "second.jsonl")] == ["swap", "swap", "delete", "delete"]
    only_copies = write_jsonl(copies_of(first))
    refused(call(SCRIPT, "--data", only_copies, "--out", tmp_path / "third.jsonl"), "no row to alter")


def test_bad_rows_stop_or_are_listed(write_jsonl, tmp_path):
    for row, reason in (({"text": "alone"}, "text alone is trained on as it is"),
                        ({"text": " ", "label": "a"}, '"text" must be a string with text'),
                        ({"tokens": ["a"], "tags": []}, "of one length"), ({"messages": []}, '"messages" must be a list of turns')):
        path = write_jsonl([*LABELS, row])
        refused(call(SCRIPT, "--data", path, "--out", tmp_path / "out.jsonl"), f"{path}, row 3: ", reason)
    result = call(SCRIPT, "--data", path, "--out", tmp_path / "out.jsonl", "--on_bad_row", "skip")
    assert result.code == 0 and "skipped row 3: " in result.out and rows_of(tmp_path / "out.jsonl")[:2] == LABELS


@pytest.mark.parametrize("name", ["dev", "test", "validation", "val", "oos_test", "Test", "test-2"])
def test_held_out_files_are_refused(name, write_jsonl, tmp_path):
    path = write_jsonl(LABELS, f"{name}.jsonl")
    refused(call(SCRIPT, "--data", path, "--out", tmp_path / "out.jsonl"), f"--data {path} is a dev or test file by its name")
    train = write_jsonl(LABELS, "train.jsonl")
    refused(call(SCRIPT, "--data", train, "--out", tmp_path / "new" / path.name), "is a dev or test file by its name")
    assert not (tmp_path / "new").exists()


def test_files_of_a_held_out_folder_are_refused(write_jsonl, tmp_path):
    for split in ("train", "dev"):
        write_jsonl(LABELS, f"d/{split}/0.jsonl")
    path, link = tmp_path / "d" / "dev" / "0.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    for name in (path, link):
        refused(call(SCRIPT, "--data", name, "--out", tmp_path / "out.jsonl"), f"--data {name} is a dev or test file")
    refused(call(SCRIPT, "--data", tmp_path / "d/train/0.jsonl", "--out", tmp_path / "d/dev/1.jsonl"), "is a dev or test file by its name")
    assert call(SCRIPT, "--data", tmp_path / "d/train/0.jsonl", "--out", tmp_path / "out.jsonl").code == 0
    assert call(SCRIPT, "--data", write_jsonl(LABELS, "test/mine.jsonl"), "--out", tmp_path / "test" / "more.jsonl").code == 0


def test_out_is_never_a_file_that_is_there(write_jsonl, tmp_path):
    path = write_jsonl(LABELS)
    before = path.read_bytes()
    refused(call(SCRIPT, "--data", path, "--out", path), f"--out {path} exists already")
    assert path.read_bytes() == before


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    script = load_script(SCRIPT)

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.write(tmp_path / "out.jsonl", LABELS)
    assert not list(tmp_path.iterdir())


def test_a_copy_names_the_row_of_the_file(write_jsonl, tmp_path):
    path = write_jsonl(["", LABELS[0], "{", "", LABELS[1]])
    out = tmp_path / "out.jsonl"
    result = call(SCRIPT, "--data", path, "--out", out, "--methods", "swap", "--on_bad_row", "skip")
    assert result.code == 0 and {copy["augmented"]["from"] for copy in copies_of(out)} <= {2, 5} and copies_of(out)


def test_a_name_that_only_contains_test_is_a_train_file(write_jsonl, tmp_path):
    assert call(SCRIPT, "--data", write_jsonl(LABELS, "latest_devices.jsonl"), "--out", tmp_path / "out.jsonl").code == 0


@pytest.mark.parametrize(("words", "reason"), [
    (["--methods", "swap,shuffle"], "--methods shuffle is unknown"), (["--methods", ""], "--methods  is unknown"),
    (["--methods", "synonym"], "--methods synonym and --synonyms go together"),
    (["--methods", "backtranslate"], "--methods backtranslate and --backtranslate go together"),
    (["--paraphrase", "smollm2"], "--methods paraphrase and --paraphrase go together"),
    (["--out", "rows.jsonl.gz"], "--out rows.jsonl.gz: the rows are written as JSON Lines"),
    (["--share", "0"], "--share 0 is no share"), (["--max_similarity", "1.5"], "--max_similarity 1.5 is no share"),
    (["--per_row", "0"], "'0' is not a whole number of at least 1"), (["--langage", "en"], "--langage"),
    (["--synonyms", "nowhere.tsv", "--methods", "synonym"], "nowhere.tsv can't be read: No such file"),
    (["--methods", "paraphrase", "--paraphrase", "./nowhere"], "--model ./nowhere: no such folder"),
    (["--methods", "backtranslate", "--backtranslate", "./nowhere", "./back"], "--model ./nowhere: no such folder")])
def test_flags_that_can_not_be_obeyed(words, reason, write_jsonl, tmp_path):
    refused(call(SCRIPT, "--data", write_jsonl(LABELS), "--out", tmp_path / "out.jsonl", *words), reason)
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_can_not_be_used(write_jsonl, tmp_path):
    path = write_jsonl(LABELS)
    before = path.read_bytes()
    refused(call(SCRIPT, "--data", path, "--out", path), "exists already")
    refused(call(SCRIPT, "--data", tmp_path, "--out", tmp_path / "out.jsonl"), "is a folder: name its train.jsonl")
    refused(call(SCRIPT, "--data", path, "--out", path / "out.jsonl"), "can't be written")
    for line in ("happy", "happy\t", "very happy\tglad", "\tglad"):
        words = write_jsonl(["good\tfine", line], "words.tsv")
        result = call(SCRIPT, "--data", path, "--out", tmp_path / "out.jsonl", "--methods", "synonym", "--synonyms", words)
        refused(result, "words.tsv, row 2: ")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    refused(call(SCRIPT, "--data", path, "--out", tmp_path / "out.jsonl", "--protect", latin), "is not UTF-8")
    assert path.read_bytes() == before and not (tmp_path / "out.jsonl").exists()


def test_the_hub_out_of_reach_is_told(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", REFUSED)
    for words in (["paraphrase", "--paraphrase", "some/model"], ["backtranslate", "--backtranslate", "some/model", "other/model"]):
        refused(call(SCRIPT, "--data", write_jsonl(LABELS), "--out", tmp_path / "out.jsonl", "--methods", *words),
                "some/model is not in the cache and the Hugging Face Hub can't be reached")


# Models, trained by heart on a few lines


def learn(model, tokenizer, pairs, steps=150):
    """Fit `model` to `pairs` of source and target until it knows them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    batches = []
    for source, target in pairs:
        ids, labels = tokenizer(source).input_ids, [*tokenizer(target).input_ids, tokenizer.eos_token_id]
        if model.config.is_encoder_decoder:
            batches.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
        else:
            batches.append({"input_ids": torch.tensor([ids + labels]), "labels": torch.tensor([[-100] * len(ids) + labels])})
    for _ in range(steps):
        loss = sum(model(**batch).loss for batch in batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * len(batches)
    return model.eval()


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


FOREIGN = {"Where is my order?": "Wo ist?", "I did not pay 49.": "Nein 49.", "Is it open?": "Offen?"}
BACK = {"Wo ist?": "Where can my order be?", "Nein 49.": "I did pay 49.", "Offen?": "Is it open?"}


@pytest.fixture(scope="module")
def translators(tmp_path_factory):
    """Two folders: there and back. The way back loses a negation in the second line and changes nothing in the third."""
    folders = []
    for name, pairs in (("there", FOREIGN), ("back", BACK)):
        set_seed(0)
        tokenizer = tiny_tokenizer("llama")
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=len(tokenizer), d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, dropout_rate=0,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id))
        folders.append(saved(learn(model, tokenizer, pairs.items()), tokenizer, tmp_path_factory.mktemp("translators") / name))
    return folders


def test_backtranslation(translators, write_jsonl, tmp_path):
    rows = [{"text": text, "label": str(i)} for i, text in enumerate(FOREIGN)]
    out = tmp_path / "out.jsonl"
    result = call(SCRIPT, "--data", write_jsonl(rows), "--out", out, "--methods", "backtranslate", "--backtranslate", *translators)
    assert result.code == 0, result.err
    assert copies_of(out) == [{"text": "Where can my order be?", "label": "0", "augmented": {"from": 1, "method": "backtranslate"}}]
    assert "backtranslate: 1 copy dropped: a number, an id, a negation or a protected word changed" in result.out
    assert "backtranslate: 1 copy dropped: nothing in the row could be altered" in result.out


def test_a_wrong_kind_of_model_is_told(translators, tiny, write_jsonl, tmp_path):
    for words in (["backtranslate", "--backtranslate", tiny("llama"), tiny("llama")], ["paraphrase", "--paraphrase", translators[0]]):
        refused(call(SCRIPT, "--data", write_jsonl(LABELS), "--out", tmp_path / "out.jsonl", "--methods", *words), "can't be loaded as a")


def test_paraphrases(write_jsonl, tmp_path):
    answers = {"Where is my order?": "\"Could you find my order?\"", "Order 7 is late.": "Order 8 is late."}
    tokenizer = tiny_tokenizer("llama")
    asked = {}
    for text, answer in answers.items():
        ask = f"Say the following in other words. Keep its meaning, names and numbers. Answer with the new sentence only.\n\n{text}"
        asked[f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n"] = answer
    set_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=tokenizer.eos_token_id))
    tokenizer.chat_template = CHATML
    folder = saved(learn(model, tokenizer, asked.items(), steps=100), tokenizer, tmp_path / "model")
    rows = [{"text": text, "label": "a"} for text in answers]
    out = tmp_path / "out.jsonl"
    result = call(SCRIPT, "--data", write_jsonl(rows), "--out", out, "--methods", "paraphrase", "--paraphrase", folder)
    assert result.code == 0, result.err
    assert copies_of(out) == [{"text": "Could you find my order?", "label": "a", "augmented": {"from": 1, "method": "paraphrase"}}]
    assert "paraphrase: 1 copy dropped: a number, an id, a negation or a protected word changed" in result.out


def test_the_bundled_data_can_be_augmented(tmp_path):
    out = tmp_path / "train.jsonl"
    result = call(SCRIPT, "--data", ROOT / "data/customer_service/train.jsonl", "--out", out, "--methods", "noise,variant")
    assert result.code == 0, result.err
    copies = copies_of(out)
    assert len(copies) > 300 and {copy["augmented"]["method"] for copy in copies} == {"noise", "variant"}
    assert [data.check_dialogue(copy) for copy in copies] == [None] * len(copies)
    assert all(copy["language"] == "zh" for copy in copies if copy["augmented"]["method"] == "variant")
