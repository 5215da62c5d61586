"""What is read, what is refused, and what the refusal says: file, row, and what is wrong.

    python -m pytest tests/test_data.py
"""

import hashlib
import json
import os

import pytest

from recipes.common.data import Rows, check_dialogue, find, identify, load, load_split, read
from recipes.common.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


def dialogue(*turns, **columns):
    """A row of (role, content) pairs."""
    return {"messages": [{"role": role, "content": content} for role, content in turns], **columns}


def numbered(n):
    """n dialogues that differ."""
    return [dialogue(("user", f"Question {i}"), ("assistant", f"Answer {i}")) for i in range(n)]


def questions(rows: Rows):
    return [row["messages"][0]["content"] for row in rows.rows]


# ------------------------------------------------------------------------------------------------------------ bad rows

TWICE = '{"messages": 1} {"messages": 2}'
BAD_ROWS = {
    "broken JSON": ('{"messages": [', r"broken JSON at column 15 \(Expecting value\): '\{\"messages\": \['"),
    "single quotes": ("{'messages': []}", r"broken JSON at column 2"),
    "two objects on a line": (TWICE, r"broken JSON at column 17 \(Extra data\)"),
    "a line break in the middle": ('{"messages": [{"role": "user", "content": "Hi', r"broken JSON at column 43 \(Unterminated string"),
    "nested too deeply": ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", r"JSON nested too deeply"),
    "a number without end": ('{"messages": ' + "1" * 5000 + "}", r"JSON that can't be read \(Exceeds the limit"),
    "a list": (["Hi", "Yo"], r"expected a JSON object, not '\[\"Hi\", \"Yo\"\]'"),
    "a string": ('"Hi"', r"expected a JSON object, not 'Hi'"),
    "null": ("null", r"expected a JSON object, not 'null'"),
    "other columns": ({"prompt": "Hi", "reply": "Yo"}, r'no column "messages" \(columns: prompt, reply\); a dialogue is \{"messages"'),
    "no column": ({}, r'no column "messages" \(columns: none\)'),
    "misspelled column": ({"message": GOOD["messages"]}, r'no column "messages" \(columns: message\)'),
    "messages is a string": ({"messages": "Hi"}, r'"messages" must be a list of turns'),
    "messages is null": ({"messages": None}, r'"messages" must be a list of turns'),
    "no turns": ({"messages": []}, r'"messages" must be a list of turns that is not empty'),
    "a turn is a string": ({"messages": ["Hi"]}, r"turn 1 must be an object with \"role\" and \"content\", not 'Hi'"),
    "a turn without content": ({"messages": [{"role": "user"}]}, r'turn 1 must be an object with "role" and "content"'),
    "half of ShareGPT's names": ({"messages": [{"from": "human", "text": "Hi"}]}, r'turn 1 must be an object with "role" and "content"'),
    "wrong role": (dialogue(("user", "Hi"), ("bot", "Yo")), r"turn 2: role 'bot' is unknown; use one of system, user, assistant, tool"),
    "role in capitals": (dialogue(("User", "Hi"), ("assistant", "Yo")), r"turn 1: role 'User' is unknown"),
    "role is a list": (dialogue((["user"], "Hi"), ("assistant", "Yo")), r"turn 1: role '\[\"user\"\]' is unknown"),
    "role is null": (dialogue((None, "Hi"), ("assistant", "Yo")), r"turn 1: role 'null' is unknown"),
    "content is a number": (dialogue(("user", 5), ("assistant", "Yo")), r"turn 1: content must be a string, not '5'"),
    "content is null": (dialogue(("user", "Hi"), ("assistant", None)), r"turn 2: content must be a string, not 'null'"),
    "content has a picture": (dialogue(("user", [{"type": "text", "text": "Hi"}, {"type": "image_url"}]), ("assistant", "Yo")),
                              r"turn 1: content must be text, but has a part of type 'image_url': remove it"),
    "content is a list of strings": (dialogue(("user", ["Hi"]), ("assistant", "Yo")), r"turn 1: content must be text, but has a part"),
    "two shapes": ({**GOOD, "conversations": []}, r"fit more than one shape \(messages and conversations\): rename .*unused=conversations"),
    "content is empty": (dialogue(("user", "Hi"), ("assistant", "")), r"turn 2 \(assistant\) is empty"),
    "content is blank": (dialogue(("user", " \n\u3000"), ("assistant", "Yo")), r"turn 1 \(user\) is empty"),
    "half a character": ('{"messages": [{"role": "user", "content": "Hi \\ud83d"}, {"role": "assistant", "content": "Yo"}]}',
                         r"there is half a character \(a lone surrogate\) in 'Hi "),
    "half a character elsewhere": ('{"id": "\\udc00", "messages": []}', r"there is half a character"),
    "half a character in a key": ('{"\\ud83d": 1, "messages": []}', r"there is half a character"),
    "a NUL": ('{"messages": [{"role": "user", "content": "Hi\\u0000"}]}', r"there is a NUL character"),
    "a key twice": ('{"messages": [], "messages": []}', r"the key 'messages' stands twice in one object: keep one"),
    "a key twice in a turn": ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', r"the key 'content' stands twice"),
    "no number": ('{"messages": [], "score": NaN}', r"NaN is no number of JSON"),
    "minus infinity": ('{"messages": [], "score": -Infinity}', r"-Infinity is no number of JSON"),
    "a number too large": ('{"messages": [], "score": 1e999}', r"the number '1e999' is too large"),
    "nested deeply": ('{"messages": ' + "[" * 200 + "]" * 200 + "}", r"JSON nested too deeply \(more than 100"),
    "nested very deeply": ("[" * 10**5 + "]" * 10**5, r"JSON nested too deeply"),
    "system turn late": (dialogue(("user", "Hi"), ("system", "Be kind."), ("assistant", "Yo")),
                         r"turn 2: a system turn may only come first"),
    "two system turns": (dialogue(("system", "Be kind."), ("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo")),
                         r"turn 2: a system turn may only come first"),
    "train is a word": ({"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "train": "no"}]},
                        r"turn 2: \"train\" must be true or false, not 'no'"),
    "train is a number": ({"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "train": 0}]},
                          r'turn 2: "train" must be true or false'),
    "no assistant turn": (dialogue(("user", "Hi"), ("user", "Hello?")), r"no assistant turn, so there is nothing to learn"),
    "no turn to train on": ({"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "train": False}]},
                            r'every assistant turn has "train": false'),
}


@pytest.mark.parametrize("why", BAD_ROWS)
def test_a_bad_row_stops_the_run_with_file_and_row(write_jsonl, why):
    row, reason = BAD_ROWS[why]
    raw = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    path = write_jsonl([GOOD, GOOD, raw, GOOD])
    with pytest.raises(UserError, match=reason) as caught:
        read(path, check_dialogue)
    message = str(caught.value)
    assert message.startswith(f"{path}, row 3: ") and "--on_bad_row skip" in message
    assert "\n" not in message and len(message) < len(str(path)) + 350


@pytest.mark.parametrize("why", BAD_ROWS)
def test_a_bad_row_is_skipped_and_listed_on_request(write_jsonl, why):
    row, reason = BAD_ROWS[why]
    path = write_jsonl([GOOD, row if isinstance(row, str) else json.dumps(row), GOOD])
    rows = read(path, check_dialogue, on_bad_row="skip")
    assert rows.rows == [GOOD, GOOD] and len(rows.skipped) == 1
    assert rows.skipped[0].startswith("row 2: ")


def test_kept_and_skipped_add_up_to_what_was_read(write_jsonl):
    bad = [raw if isinstance(raw, str) else json.dumps(raw) for raw, _ in BAD_ROWS.values()]
    mixed = [line for i, raw in enumerate(bad) for line in (numbered(len(bad))[i], raw)]
    rows = read(write_jsonl(mixed), check_dialogue, on_bad_row="skip")
    assert len(rows.rows) + len(rows.skipped) == len(mixed) and len(rows.skipped) == len(bad)
    assert rows.rows == numbered(len(bad))
    assert [sentence.split(":")[0] for sentence in rows.skipped] == [f"row {2 * i}" for i in range(1, len(bad) + 1)]


def test_the_first_bad_row_is_the_one_that_is_named(write_jsonl):
    with pytest.raises(UserError, match="row 2: .*'bot'"):
        read(write_jsonl([GOOD, dialogue(("bot", "Hi")), "{"]), check_dialogue)


@pytest.mark.parametrize("row", [
    GOOD,
    dialogue(("system", "Be kind."), ("user", "Hi"), ("assistant", "Yo"), id="a", language="en"),
    dialogue(("user", "Hi"), ("user", "Hello?"), ("assistant", "Yo")),
    dialogue(("assistant", "How can I help?"), ("user", "Hi"), ("assistant", "Yo")),
    dialogue(("user", "Hi"), ("assistant", "Let me look."), ("tool", "{}"), ("assistant", "Yo")),
    dialogue(("user", "Hi"), ("assistant", "Yo"), ("user", "Bye")),
    dialogue(("user", "😊"), ("assistant", "好的\n\U0002000b")),
    {"messages": [{"role": "user", "content": "Hi", "intent": "greet", "train": True}, {**GOOD["messages"][1], "train": True}]},
    {"messages": [*GOOD["messages"], {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No.", "train": False}]},
])
def test_good_rows_are_kept_as_they_stand(write_jsonl, row):
    assert read(write_jsonl([row]), check_dialogue).rows == [row]


def test_the_check_is_the_tasks_own(write_jsonl):
    path = write_jsonl([{"text": "Hi", "label": 1}, {"text": "Yo"}])
    with pytest.raises(UserError, match="row 2: no label"):
        read(path, lambda row: None if "label" in row else "no label")


# --------------------------------------------------------------------------------------------------------------- files


def test_an_unknown_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--data .*nowhere\.jsonl: no such file or folder"):
        find(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match=r"nowhere\.jsonl can't be read: No such file"):
        read(tmp_path / "nowhere.jsonl", check_dialogue)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r" can't be read: Is a directory"):
        read(tmp_path, check_dialogue)


@pytest.mark.parametrize("text", ["", "\n", "  \n\r\n\t\n", "\ufeff"])
def test_a_file_without_rows_is_refused(tmp_path, text):
    path = tmp_path / "train.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.jsonl holds no row: data/README\.md says what a file may hold"):
        read(path, check_dialogue)


def test_a_file_of_bad_rows_only_is_refused_even_when_they_are_skipped(write_jsonl):
    with pytest.raises(UserError, match=r"train\.jsonl holds no usable row"):
        read(write_jsonl(["{", "[]"]), check_dialogue, on_bad_row="skip")


def test_a_file_that_is_not_utf8_is_refused_with_the_row(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + '{"messages": "café"}'.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"train\.jsonl, row 3: not UTF-8 text, nor .* \(byte 0xe9 at offset \d+\); save the file as UTF-8"):
        read(path, check_dialogue)


def test_utf16_without_its_mark_is_refused(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(json.dumps(GOOD).encode("utf-16-le"))
    with pytest.raises(UserError, match="looks like UTF-16 without its byte order mark"):
        read(path, check_dialogue)


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")  # as Windows editors save it
    assert read(path, check_dialogue).rows == [GOOD]


def test_blank_lines_are_allowed_and_counted_in_row_numbers(write_jsonl):
    assert read(write_jsonl(["", GOOD, "   ", "\t", GOOD, ""]), check_dialogue).rows == [GOOD, GOOD]
    with pytest.raises(UserError, match="row 5: broken JSON"):
        read(write_jsonl(["", GOOD, "   ", "\t", "{", ""]), check_dialogue)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_line_separator_inside_a_string_ends_no_row(write_jsonl, character):
    row = dialogue(("user", f"one{character}two"), ("assistant", "Yo"))
    # JSON allows U+2028 and its like raw in a string; control characters below U+0020 it wants escaped.
    rows = read(write_jsonl([json.dumps(row, ensure_ascii=character < " "), GOOD]), check_dialogue)
    assert rows.rows == [row, GOOD]


def test_the_last_line_needs_no_line_break(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD), encoding="utf-8")
    assert len(read(path, check_dialogue).rows) == 2


def test_sha256_is_that_of_the_file(write_jsonl):
    path = write_jsonl(numbered(3))
    first = read(path, check_dialogue)
    assert first.source == str(path)
    assert first.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read(write_jsonl(numbered(4)), check_dialogue).sha256 != first.sha256


# -------------------------------------------------------------------------------------------------------------- splits


def test_a_folder_with_train_dev_and_test(write_jsonl, tmp_path):
    for name, n in (("train", 5), ("dev", 3), ("test", 2)):
        write_jsonl(numbered(n), f"data/{name}.jsonl")
    splits = load(str(tmp_path / "data"), check_dialogue, dev_fraction=0.5, seed=0)
    assert {name: len(rows.rows) for name, rows in splits.items()} == {"train": 5, "dev": 3, "test": 2}
    assert splits["dev"].source == str(tmp_path / "data" / "dev.jsonl")


@pytest.mark.parametrize("name", ["dev", "validation", "val"])
def test_other_names_of_dev(write_jsonl, tmp_path, name):
    write_jsonl(numbered(5), "data/train.jsonl")
    path = write_jsonl(numbered(3), f"data/{name}.jsonl")
    splits = load(str(tmp_path / "data"), check_dialogue, dev_fraction=0.5, seed=0)
    assert list(splits) == ["train", "dev"] and len(splits["train"].rows) == 5
    assert splits["dev"].source == str(path)


def test_dev_comes_before_its_other_names(write_jsonl, tmp_path):
    for name in ("train", "val", "validation", "dev"):
        write_jsonl([GOOD], f"data/{name}.jsonl")
    assert find(str(tmp_path / "data"))["dev"].name == "dev.jsonl"


def test_a_folder_without_splits_is_refused(write_jsonl, tmp_path):
    write_jsonl([GOOD], "data/chats.jsonl")
    with pytest.raises(UserError, match=r"--data .*data: the folder holds no train\.jsonl, dev\.jsonl or test\.jsonl"):
        load(str(tmp_path / "data"), check_dialogue, dev_fraction=0.1, seed=0)


def test_a_folder_without_train_is_refused_for_training_only(write_jsonl, tmp_path):
    write_jsonl([GOOD], "data/test.jsonl")
    assert list(find(str(tmp_path / "data"))) == ["test"]
    with pytest.raises(UserError, match=r"data has no train file, such as train\.jsonl"):
        load(str(tmp_path / "data"), check_dialogue, dev_fraction=0.1, seed=0)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_bad_row_of_any_split_is_named(write_jsonl, tmp_path, split):
    write_jsonl(numbered(3), "data/train.jsonl")
    path = write_jsonl([GOOD, "{"], f"data/{split}.jsonl")
    with pytest.raises(UserError, match=f"{path}, row 2: broken JSON"):
        load(str(tmp_path / "data"), check_dialogue, dev_fraction=0.1, seed=0)


def test_a_share_is_held_out_where_there_is_no_dev_file(write_jsonl):
    path = write_jsonl(numbered(40))
    splits = load(str(path), check_dialogue, dev_fraction=0.25, seed=3)
    train, dev = questions(splits["train"]), questions(splits["dev"])
    assert (len(train), len(dev)) == (30, 10)
    assert not set(train) & set(dev) and set(train) | set(dev) == {f"Question {i}" for i in range(40)}
    assert train == sorted(train, key=lambda q: int(q.split()[1])), "the order of the file is kept"
    assert splits["dev"].source == f"{path} (10 rows held out, seed 3)" and splits["dev"].sha256 == splits["train"].sha256


def test_the_held_out_share_is_repeatable_and_depends_on_the_seed(write_jsonl):
    path = str(write_jsonl(numbered(40)))
    dev = {seed: questions(load(path, check_dialogue, 0.25, seed)["dev"]) for seed in (0, 1, 2)}
    assert dev[0] == questions(load(path, check_dialogue, 0.25, 0)["dev"])
    assert dev[0] != dev[1] != dev[2] != dev[0]


def test_the_held_out_share_also_comes_from_a_folder_with_train_and_test(write_jsonl, tmp_path):
    write_jsonl(numbered(10), "data/train.jsonl")
    write_jsonl(numbered(2), "data/test.jsonl")
    splits = load(str(tmp_path / "data"), check_dialogue, dev_fraction=0.2, seed=0)
    assert {name: len(rows.rows) for name, rows in splits.items()} == {"train": 8, "test": 2, "dev": 2}


def test_at_least_one_dialogue_is_held_out_and_one_is_left(write_jsonl):
    splits = load(str(write_jsonl(numbered(2))), check_dialogue, dev_fraction=0.01, seed=0)
    assert len(splits["train"].rows) == len(splits["dev"].rows) == 1
    with pytest.raises(UserError, match=r"train\.jsonl has one row: training needs at least two"):
        load(str(write_jsonl([GOOD])), check_dialogue, dev_fraction=0.01, seed=0)


@pytest.mark.parametrize("n, fraction", [(2, 0.9), (3, 0.99), (10, 0.96)])
def test_a_large_share_leaves_something_to_train_on(write_jsonl, n, fraction):
    splits = load(str(write_jsonl(numbered(n))), check_dialogue, dev_fraction=fraction, seed=0)
    assert len(splits["train"].rows) == 1 and len(splits["dev"].rows) == n - 1


def test_skipped_rows_are_never_held_out(write_jsonl):
    lines = [row if i % 2 else "{" for i, row in enumerate(numbered(20))]
    splits = load(str(write_jsonl(lines)), check_dialogue, dev_fraction=0.3, seed=0, on_bad_row="skip")
    assert len(splits["train"].rows) + len(splits["dev"].rows) == 10 and len(splits["train"].skipped) == 10
    assert splits["dev"].skipped == []


@pytest.mark.parametrize("where", ["itself", "its folder", "process substitution"])
def test_a_pipe_is_refused_at_once(where, tmp_path):
    pipe, (end, other) = tmp_path / "train.jsonl", os.pipe()
    os.mkfifo(pipe)
    name = {"itself": str(pipe), "its folder": str(tmp_path), "process substitution": f"/dev/fd/{end}"}[where]
    try:
        with pytest.raises(UserError, match="is a pipe or a device, and a file is read more than once: write it to a file first"):
            identify(name)
        with pytest.raises(UserError, match="write it to a file first"):
            load_split(name, "train", check_dialogue, 0.1, 42)
    finally:
        os.close(end)
        os.close(other)
