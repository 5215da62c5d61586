"""scripts/doctor.py on small files: what it says is what the training does, every bad row has its number, nothing is half-written.

    python -m pytest tests/test_doctor_script.py
"""

import argparse
import datetime
import gzip
import importlib.util
import json
import re
import shlex
import shutil
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHATML, DIALOGUES, ROOT, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.common import args, chat, data, deadline, disk, doctor_tokens, formats, models, tasks
from recipes.common.errors import UserError

spec = importlib.util.spec_from_file_location("doctor_script", ROOT / "scripts/doctor.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

LABELS = [{"text": f"{q} {'please ' * (i % 9)}", "label": ["order", "card", "hours"][i % 3]} for i, q in enumerate(
    ["Where is my order?", "我的卡丢了", "Are you open?", "My order MW204518 is late", "My card is lost", "Until nine?"] * 3)]
TAGS = [{"tokens": ["book", *["very"] * i, "Friday", "please"], "tags": ["O", *["O"] * i, "B-day", "O"]} for i in range(12)]
PAIRS = [{"source": "Where is my order? " * (1 + i % 5) * 4, "target": "我的订单在哪里？" * (40 if i == 5 else 1 + i % 3)}
         for i in range(12)]
TURNS_WITH_LABELS = [{"messages": [{"role": "user", "content": f"{row['text']} Now?", "label": row["label"]},
                                   {"role": "assistant", "content": "One moment."},
                                   {"role": "user", "content": row["text"], "label": "thanks"}]} for row in LABELS]
COMPARED = [("A longer question, with many words in it" * (i % 3), "and its answer " * (i % 5)) for i in range(12)]
# (model, rows, a max_length that shortens some of them, flags)
CASES = {
    "chat": ("llama", DIALOGUES * 3, 40, {}),
    "classify": ("bert", LABELS, 16, {}),
    "turns": ("bert", TURNS_WITH_LABELS, 20, {"task": "classify", "context_turns": 2}),
    "pairs": ("bert", [{"text": a or "Hi", "text_pair": b or None, "label": "ab"[i % 2]} for i, (a, b) in enumerate(COMPARED)], 30,
              {"task": "classify"}),
    "several labels": ("gpt2", [{"text": row["text"], "label": ["x", "y", "z"][: i % 3]} for i, row in enumerate(LABELS)], 12,
                       {"task": "classify", "multi_label": True}),
    "out of scope": ("bert", LABELS, 16, {"task": "classify", "oos_label": "hours"}),
    "tag": ("bert", TAGS, 9, {}),
    "tag by a decoder": ("gpt2", TAGS, 20, {"task": "tag"}),
    "translate": ("t5", PAIRS, 60, {"source_prefix": "say: "}),
    "translate by a decoder": ("llama", [{**row, "target": row["target"][:40]} for row in PAIRS], 90,
                               {"task": "translate", "instruction": "Translate."}),
}
KIND = {"classify": "bert", "tag": "bert", "translate": "t5"}


@pytest.fixture
def doctor(tiny, capsys):
    """doctor("--data", path, ...) -> (exit status, what was printed), with the tiny model of the task unless --model is given."""
    def call(*words) -> tuple[int, str]:
        words = list(map(str, words))
        task = words[words.index("--task") + 1] if "--task" in words else "chat"
        if "--model" not in words:
            words += ["--model", str(tiny(KIND.get(task, "llama")))]
        capsys.readouterr()
        status = script.main(words)
        printed = capsys.readouterr()
        return status, printed.out + "".join(line for line in printed.err.splitlines(keepends=True) if line.startswith("error: "))

    return call


def loaded(flags: dict, model, **others) -> tasks.Task:
    """The task as a training loads it."""
    shared = args.SharedArguments(**flags, model=str(model), **others)
    return tasks.load(shared, args.Method(), SimpleNamespace(
        seed=args.SEED, process_index=0, main_process_first=lambda desc: nullcontext()))


# What is read


def test_every_bad_row_is_listed(doctor, write_jsonl, tmp_path):
    bad = ['{"messages": []}', '{"messages": [', '{"text": "no dialogue"}', "[1]"]
    path = write_jsonl([DIALOGUES[0], *bad, "", DIALOGUES[1], *['{"messages": 3}'] * 20])
    status, out = doctor("--data", path, "--json", tmp_path / "found.json")
    assert status == 2
    assert f"train: 26 rows read, 2 kept, 24 refused ({path})\n" in out
    assert '  row 2: "messages" must be a list of turns that is not empty\n  row 3: broken JSON at column 15' in out
    assert "  row 5: expected a JSON object, not '[1]'\n" in out and "  ... and 14 more; --json OUT lists all\n" in out
    assert re.search(r"^error: 24 of 26 rows in .*break the column contract \(rows 2, 3, 4, 5, 8, .* and 14 more\); mend ", out, re.M)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    [file] = found["files"]
    assert (file["read"], file["kept"], len(file["refused"])) == (26, 2, 24) and found["exit_status"] == 2
    assert [bad["row"] for bad in file["refused"]] == [2, 3, 4, 5, *range(8, 28)]
    with pytest.raises(UserError, match="row 2: "):
        data.load(str(path), data.check_dialogue, 0.1, 42)


def test_bad_rows_that_the_training_skips_are_a_warning(doctor, write_jsonl):
    path = write_jsonl([*DIALOGUES, "{}"])
    assert doctor("--data", path)[0] == 2
    status, out = doctor("--data", path, "--on_bad_row", "skip")
    assert status == 0 and "\nwarning: 1 of 5 rows in " in out
    assert doctor("--data", path, "--on_bad_row", "skip", "--strict")[0] == 1
    assert doctor("--data", write_jsonl(DIALOGUES[:2], "good.jsonl"), "--strict")[0] == 0


def test_a_file_that_cannot_be_read(doctor, write_jsonl, tmp_path):
    write_jsonl(DIALOGUES, "shop/train.jsonl")
    (tmp_path / "shop/dev.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 999)[:-9])
    status, out = doctor("--data", tmp_path / "shop")
    assert status == 2 and "dev.jsonl.gz is cut or damaged" in out and "train: 4 rows read, 4 kept" in out
    assert "\ntrain: 4 dialogues, " in out, "the other file is examined all the same"
    assert re.search(r"^error: 1 file can't be read, .* \[unreadable\]$", out, re.M)
    status, out = doctor("--data", tmp_path / "shop", "--mask_pii", tmp_path / "copy")
    assert status == 2 and "error: --mask_pii " in out and not (tmp_path / "copy").exists()


def test_csv_rows_name_their_line(doctor, tmp_path):
    (tmp_path / "faq.csv").write_text('frage,antwort\n"Two\nlines",Yes.\nWhere?,\nHow?,So.\n', encoding="utf-8")
    status, out = doctor("--data", tmp_path / "faq.csv", "--columns", "question=frage,answer=antwort")
    assert status == 2 and "train: 3 rows read, 2 kept, 1 refused" in out and "\n  row 2 (line 4): " in out


def test_an_empty_file(doctor, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n", encoding="utf-8")
    status, out = doctor("--data", tmp_path / "none.jsonl")
    assert status == 2 and "error: 0 rows are in " in out and "there is no row to train on" in out


def test_rows_of_several_files_name_their_file(doctor, write_jsonl):
    one, two = write_jsonl([DIALOGUES[0], DIALOGUES[0]], "one.jsonl"), write_jsonl([DIALOGUES[3], *DIALOGUES[1:3]], "two.jsonl")
    status, out = doctor("--data", f"{one}:3", f"{two}:1", "--dev_fraction", 0.01)
    assert "dev: 1 of the train rows are held out" in out and "note: the weights of --data are left aside" in out
    assert re.search(rf"{re.escape(str(one))}:2\)", out), "the second copy, in whichever split it is"


def test_a_source_that_its_weight_leaves_without_train_rows_stops_the_training(doctor, write_jsonl):
    one, two = write_jsonl(DIALOGUES, "one.jsonl"), write_jsonl([DIALOGUES[0], "no row"], "two.jsonl")
    flags = ("--dev_fraction", 0.01, "--on_bad_row", "skip")
    status, out = doctor("--data", f"{one}:1", f"{two}:1e-9", *flags)
    assert status == 2 and f"error: the training would stop: {two} with weight 1e-09 would give no train row" in out
    assert doctor("--data", f"{one}:1", f"{two}:1", *flags)[0] == 0


def test_copies_without_a_dev_file_stop_the_training(doctor, write_jsonl):
    path = write_jsonl([*DIALOGUES, {**DIALOGUES[0], "augmented": {"from": 1, "method": "swap"}}])
    status, out = doctor("--data", path)
    assert status == 2 and f"error: the training would stop: {path} holds altered copies of its rows" in out


# What a model makes of it


def as_words(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", *([] if value is True else [str(value)]))]


@pytest.mark.parametrize("case", CASES)
def test_the_doctor_says_what_the_training_does(case, doctor, tiny, write_jsonl, tmp_path):
    kind, rows, max_length, others = CASES[case]
    path, flags = tmp_path / "mine", {"task": case} | others
    write_jsonl(rows, "mine/train.jsonl"), write_jsonl(rows, "mine/dev.jsonl")
    training = loaded({"data": [str(path)], **flags, "max_length": max_length}, tiny(kind)).report["splits"]
    status, out = doctor("--data", path, "--model", tiny(kind), *as_words(flags), "--max_length", max_length, "--json",
                         tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["splits"]
    for split in ("train", "dev"):
        told, done = found[split]["tokens"], training[split]
        outside = sum(row["label"] == "hours" for row in rows) if "oos_label" in others and split == "train" else 0  # are not examined
        assert status == 0 and (told["shortened"], told["supervised"]) == (done["shortened"], done["supervised"])
        assert (found[split]["items"], told["left_out"]) == (done["rows"] - outside, len(done["left_out"]) - outside)
    assert training["dev"]["shortened"] or training["dev"]["left_out"], "else this test shows nothing"
    items, keeps = found["dev"]["items"], found["dev"]["tokens"]["keeps"]
    for value in {int(value) - less for value in keeps.values() for less in (0, 1)}:
        done = loaded({"data": [str(path)], **flags, "max_length": value}, tiny(kind)).report["splits"]["dev"]
        share = 100 * (items - done["shortened"] - len(done["left_out"])) / items
        assert all((share >= int(percent)) == (value >= keep) for percent, keep in keeps.items()), (value, share, keeps)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_text_is_joined_or_cut_as_in_the_training(kind, doctor, tiny, write_jsonl, tmp_path):
    path = write_jsonl([*DIALOGUES, *({"text": row["text"]} for row in LABELS)])
    done = loaded({"data": [str(path)], "task": "pretrain", "max_length": 24}, tiny(kind)).report["splits"]
    status, out = doctor("--data", path, "--task", "pretrain", "--model", tiny(kind), "--max_length", 24, "--show", 2, "--json",
                         tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["splits"]
    assert status == 0 and "labelled turns" not in out and "shortened" not in out
    for split in ("train", "dev"):
        tokens = found[split]["tokens"]
        assert (found[split]["items"], tokens["supervised"]) == (done[split]["rows"], done[split]["supervised"])
        assert tokens["joined"] == done[split]["sentences"][0] and f"--max_length 24: {tokens['joined']}; fits in one: " in out
        assert f"--- {split}, block {done[split]['blocks']} (" in out
    if kind == "bert":
        pairs = loaded({"data": [str(path)], "task": "pretrain", "max_length": 24, "next_sentence": True}, tiny(kind)).report["splits"]
        out = doctor("--data", path, "--task", "pretrain", "--model", tiny(kind), "--max_length", 24, "--next_sentence")[1]
        assert f"--max_length 24: {pairs['train']['sentences'][0]}; " in out
        # A text is cut if and only if it does not fit
        longest = found["train"]["tokens"]["keeps"]["100"]
        for value, cut in ((longest, 0), (longest - 1, 1)):
            train = loaded({"data": [str(path)], "task": "pretrain", "max_length": value}, tiny(kind)).report["splits"]["train"]
            assert (train["blocks"] > train["rows"]) == cut


def test_text_files(doctor, tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("train", "validation"):
        with gzip.open(tmp_path / "mine" / f"{name}.txt.gz", "wt", encoding="utf-8") as file:
            file.write("Where is my order?\n\n我的订单在哪里？\nMail jo@example.com\n")
    status, out = doctor("--data", tmp_path / "mine", "--task", "pretrain")
    assert status == 0 and "\ntrain: 3 texts, " in out and "leaks between splits: 3 exact" in out
    assert "(row 4)" in out, "the number of a row is that of its line"


def test_more_rows_than_files_can_be_open(doctor, write_jsonl):
    rows = [{"text": f"Question {i}", "label": "abc"[i % 3]} for i in range(1500)]
    status, out = doctor("--data", write_jsonl(rows), "--task", "classify")
    assert status == 0 and "\ntrain: 1,350 rows, " in out


# The exit status


@pytest.mark.parametrize("files, flags, stops", [
    ({"train": DIALOGUES}, {}, None),
    ({"train": [*DIALOGUES, "{}"]}, {}, 'no column "messages"'),
    ({"train": [*DIALOGUES, "{}"]}, {"on_bad_row": "skip"}, None),
    ({"train": ["{}", "[]"]}, {"on_bad_row": "skip"}, "usable|can be used"),
    ({"train": DIALOGUES, "dev": ["{}"]}, {"on_bad_row": "skip"}, "usable|can be used"),
    ({"train": DIALOGUES, "dev": []}, {}, "holds no row|0 rows"),
    ({"train": DIALOGUES, "dev": DIALOGUES[:1], "test": ["{"]}, {}, "broken JSON"),
    ({"train": DIALOGUES[:1]}, {}, "one row"),
    ({"train": DIALOGUES[:1], "dev": DIALOGUES[1:2]}, {}, None),
    ({"dev": DIALOGUES, "test": DIALOGUES}, {}, "no train file"),
    ({"train": DIALOGUES}, {"max_length": 12}, "no dialogue has a supervised token within --max_length 12"),
    ({"train": DIALOGUES, "dev": DIALOGUES[:1]}, {"max_length": 40}, "no dialogue has a supervised token within --max_length 40"),
    ({"train": DIALOGUES[1:2] * 2, "dev": DIALOGUES[2:], "test": DIALOGUES[:1]}, {"max_length": 60}, None),  # that of test is too long
    ({"train": LABELS}, {}, 'no column "messages"'),
    ({"train": LABELS}, {"task": "classify", "label": "topic"}, 'no column "topic"'),
    ({"train": LABELS}, {"task": "classify", "columns": "text=question"}, "no (row has a )?column .question."),
    ({"train": LABELS[:1] * 4}, {"task": "classify"}, "at least two"),
    ({"train": LABELS, "dev": [{"text": "New", "label": "new"}]}, {"task": "classify"}, "'new' does not occur"),
    ({"train": LABELS, "dev": [{"text": "New", "label": "new"}, LABELS[0]]}, {"task": "classify", "on_bad_row": "skip"}, None),
    ({"train": LABELS, "dev": [{"text": "New", "label": "new"}]}, {"task": "classify", "on_bad_row": "skip"}, "no row is left"),
    ({"train": LABELS, "dev": LABELS[1:2], "test": [{"text": "New", "label": "new"}]}, {"task": "classify"}, None),
    ({"train": LABELS, "dev": [{"text": "New", "label": "oos"}]}, {"task": "classify", "oos_label": "oos"}, "all rows are out of scope"),
    ({"train": [{"tokens": ["a"], "tags": ["O"]}] * 4}, {"task": "tag"}, "no tag but O"),
    ({"train": [{"tokens": ["a"], "tags": ["X"]}] * 4}, {"task": "tag"}, "is not IOB2"),
    ({"train": PAIRS[5:6] * 3}, {"task": "translate", "max_length": 40}, "every target is longer"),
    ({"train": [{"text": "龘"}] * 4}, {"task": "pretrain"}, "knows no word"),
    ({"train": [{"source": "a"}] * 4}, {"task": "translate"}, 'no column "target"'),
    ({"train": DIALOGUES, "dev": DIALOGUES[:2]}, {}, None),  # a leak makes scores wrong, but stops nothing
])
def test_the_doctor_stops_where_the_training_stops(files, flags, stops, doctor, tiny, write_jsonl, tmp_path):
    folder = tmp_path / "mine"
    for name, rows in files.items():
        write_jsonl(rows, f"mine/{name}.jsonl")
    model = tiny({"pretrain": "bert"}.get(flags.get("task"), KIND.get(flags.get("task", "chat"), "llama")))
    with nullcontext() if stops is None else pytest.raises(UserError, match=stops):
        loaded({"data": [str(folder)], **flags}, model)
    status, out = doctor("--data", folder, "--model", model, *as_words(flags))
    assert status == (0 if stops is None else 2), out
    assert stops is None or re.search(stops, out), "it says the same"
    if stops is None:
        assert ("\nwarning: " in out) == (doctor("--data", folder, "--model", model, *as_words(flags), "--strict")[0] == 1)


@pytest.fixture(scope="module")
def two_tasks(tiny):
    """(max_length) -> the chat task with this limit, and without one."""
    source = models.resolve(str(tiny("llama")))
    tokenizer, kind = models.load_tokenizer(source), tasks.module("chat")

    def make(max_length: int):
        return [kind.make(args.SharedArguments(max_length=length), source, tokenizer, {}) for length in (max_length, doctor_tokens.WHOLE)]

    return make


TEXTS = st.text(st.sampled_from("ab é好的？\n龘"), min_size=1, max_size=20).map(lambda text: f"{text}.")
TURNS = st.lists(st.tuples(st.sampled_from(["user"] * 3 + ["assistant", "tool"]), TEXTS, TEXTS, st.booleans()), min_size=1, max_size=5)


def dialogue_of(turns, system) -> dict:
    """Mostly a question and an answer in turn; some answers come one after another, and some are context."""
    messages = [{"role": "system", "content": "Be kind."}] if system else []
    for role, text, answer, train in turns:
        messages += [{"role": role, "content": text}, {"role": "assistant", "content": answer, **({} if train else {"train": False})}]
    return {"messages": messages}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(rows=st.lists(st.builds(dialogue_of, TURNS, st.booleans()), min_size=1, max_size=4),
       max_length=st.integers(20, 200))
def test_what_is_shortened_and_left_out_is_what_training_shortens_and_leaves_out(two_tasks, rows, max_length):
    rows = [row for row in rows if data.check_dialogue(row) is None]
    if not rows:
        return
    task, whole = two_tasks(max_length)
    numbers = [10 + i for i in range(len(rows))]
    encoded, findings = doctor_tokens.encode("train", disk.store(rows), script.Part("mine", disk.store(rows), numbers), task, whole,
                                             args.SharedArguments())
    one_by_one = [chat.encode(row["messages"], task.tokenizer, max_length) for row in rows]
    split = encoded.summary
    left_out = [n for n, tokens in zip(split.numbers, split.supervised, strict=True) if tokens == 0]
    shortened = [n for n, length, tokens in zip(split.numbers, split.lengths, split.supervised, strict=True)
                 if length > max_length and tokens]
    assert left_out == [n for n, one in zip(numbers, one_by_one, strict=True) if one is None]
    assert shortened == [n for n, one in zip(numbers, one_by_one, strict=True) if one and one.dropped_turns]
    try:
        features, counts = task.encode(rows, "train", "stop", True)
    except UserError as error:
        assert left_out == numbers and [f.code for f in findings] == ["stops"] and str(error) in findings[0].sentence
        return
    assert findings == []
    assert list(encoded.features) == list(features) and sum(split.supervised) == counts["supervised"]
    assert (len(shortened), [n - 9 for n in left_out]) == (counts["shortened"], counts["left_out"])


def test_dev_rows_are_those_that_training_holds_out(doctor, write_jsonl, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "Yes."}]} for i in range(30)]
    one, two = write_jsonl(rows[:10], "one.jsonl"), write_jsonl(rows[10:], "two.jsonl")
    options = script.parse(["--data", str(one), str(two), "--dev_fraction", "0.3", "--seed", "7"])
    sources = [{"train": script.read(path, data.check_dialogue, None, {})} for path in (one, two)]
    script.hold_out(sources, options)
    held_out = data.load([str(one), str(two)], data.check_dialogue, 0.3, 7)
    for split in ("train", "dev"):
        part = script.joined([source[split] for source in sources])
        assert part.rows == held_out[split].rows
        assert part.numbers == [f"{one}:{i + 1}" if (i := rows.index(row)) < 10 else f"{two}:{i - 9}" for row in part.rows]


def test_rows_that_do_not_come_are_an_error(doctor, write_jsonl, monkeypatch):
    records = formats.records
    monkeypatch.setattr(formats, "records", lambda file: (time.sleep(60 * i) or row for i, row in enumerate(records(file))))
    monkeypatch.setattr(deadline, "limit", 0)
    status, out = doctor("--data", write_jsonl(DIALOGUES), "--data_timeout", "1")
    assert status == 2 and "the data did not come within 1 s (--data_timeout)" in out


def test_only_the_tokenizer_is_needed(doctor, tiny, write_jsonl, tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert doctor("--data", write_jsonl(DIALOGUES), "--model", folder)[0] == 0
    with pytest.raises(UserError, match="no .safetensors weights"):
        models.resolve(str(folder))


def test_a_model_of_the_hub_that_is_out_of_reach(doctor, write_jsonl):
    status, out = doctor("--data", write_jsonl(DIALOGUES), "--model", "some/model")
    assert status == 2
    assert re.fullmatch(r"error: --model some/model is not in the cache and the Hugging Face Hub can't be reached .*\n", out)


def test_a_model_that_cannot_do_the_task(doctor, tiny, write_jsonl):
    status, out = doctor("--data", write_jsonl(DIALOGUES), "--model", tiny("bert"))
    assert status == 2 and re.fullmatch(r"error: --task chat: \S+ is an encoder .*\n", out)


def test_a_template_that_refuses_some_dialogues(doctor, tiny, write_jsonl, tmp_path):
    folder, tokenizer = shutil.copytree(tiny("llama"), tmp_path / "strict"), tiny_tokenizer("chatml")
    tokenizer.chat_template = ("{% if messages[0].role == 'system' %}{{ raise_exception('No system turns') }}{% endif %}"
                               + tokenizer.chat_template)
    tokenizer.save_pretrained(folder)
    path = write_jsonl([*DIALOGUES[1:], "", DIALOGUES[0]])
    status, out = doctor("--data", path, "--model", folder, "--dev_fraction", 0.1, "--seed", 3)
    assert status == 2 and re.search(r"^(train|dev), row 5: .*No system turns", out, re.M)
    assert re.search(r"^error: 1 of \d dialogues in (train|dev) can't be trained on .*\(row 5\).*\[refused-row\]$", out, re.M)


def with_template(tiny, folder, template: str):
    """A copy of the tiny model with this chat template; its tokenizer has a first token."""
    shutil.copytree(tiny("llama"), folder)
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.bos_token, tokenizer.chat_template = "<|endoftext|>", template
    tokenizer.save_pretrained(folder)
    return folder


BEGIN = CHATML.replace("{% for", "{{ bos_token }}{% for", 1)


@pytest.mark.parametrize("template, complaint", [
    (CHATML.replace("+ '<|im_end|>\n'", "+ ('<|im_end|>' if message['role'] == 'user' else '') + '\n'"), "does not end an assistant turn"),
    (CHATML.replace("message['content']", "(message['content'] if message['role'] == 'user' else '')"), "assistant's turn 2 exactly once"),
    (CHATML.replace("message['content']", "message['content'].lower()"), "changes the text of turn 2"),
])
def test_templates_by_which_no_answer_could_be_learned(template, complaint, doctor, tiny, write_jsonl, tmp_path):
    model, path = with_template(tiny, tmp_path / "model", template), write_jsonl(DIALOGUES)
    with pytest.raises(UserError, match=complaint):
        loaded({"data": [str(path)]}, model)
    status, out = doctor("--data", path, "--model", model)
    assert status == 2 and re.search(rf"^error: the training would stop: .*{complaint}.*\[stops\]$", out, re.M)


@pytest.mark.parametrize("broken, complaint", [
    ("+ ('' if message['role'] == 'assistant' and messages[0]['role'] == 'system' else '<|im_end|>') + '\n'",
     "does not end an assistant turn"),
    ("+ '<|im_end|>\n' + ('' if messages[0]['role'] != 'system' else message['content'] + '\n')", "exactly once"),
])
def test_dialogues_in_which_a_template_loses_the_answer_or_its_end(broken, complaint, doctor, tiny, write_jsonl, tmp_path):
    model = with_template(tiny, tmp_path / "model", CHATML.replace("+ '<|im_end|>\n'", broken))
    path = write_jsonl([*DIALOGUES[1:], DIALOGUES[0]])
    status, out = doctor("--data", path, "--model", model)
    assert status == 2 and re.search(rf"^(train|dev), row 4: .*{complaint}", out, re.M) and "[refused-row]" in out


def test_a_first_token_that_stands_twice(doctor, tiny, write_jsonl, tmp_path):
    once = with_template(tiny, tmp_path / "once", BEGIN)
    twice = with_template(tiny, tmp_path / "twice", BEGIN.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"))
    plain = with_template(tiny, tmp_path / "plain", "{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    path = write_jsonl(DIALOGUES)
    assert "[double-bos]" not in doctor("--data", path, "--model", once)[1]
    status, out = doctor("--data", path, "--model", twice)
    assert status == 0 and re.search(r"^warning: 3 rows in train begin with the first token twice \(rows ", out, re.M)
    assert doctor("--data", path, "--model", twice, "--strict")[0] == 1
    rows = [*DIALOGUES[1:], {"messages": [{"role": "user", "content": "<|endoftext|>Hi"}, {"role": "assistant", "content": "Yo"}]}]
    status, out = doctor("--data", write_jsonl(rows), "--model", plain, "--dev_fraction", 0.1)
    assert status == 0 and re.search(r"^warning: 1 row in (train|dev) begins with the first token twice \(row 4\)", out, re.M)


def test_how_the_assistants_turns_are_found_is_told(doctor, tiny, write_jsonl, tmp_path):
    path, note = write_jsonl(DIALOGUES), "note: the chat template does not mark the assistant's turns ({% generation %})"
    assert note in doctor("--data", path)[1]
    marking = CHATML.replace("{{ '<|im_start|>' + message", "{% generation %}{% endgeneration %}{{ '<|im_start|>' + message")
    assert note not in doctor("--data", path, "--model", with_template(tiny, tmp_path / "marking", marking))[1]
    assert note not in doctor("--data", write_jsonl(LABELS), "--task", "classify")[1]


def test_labels_that_train_does_not_have(doctor, write_jsonl, tmp_path):
    write_jsonl(LABELS, "mine/train.jsonl")
    write_jsonl(["", *LABELS[:3], {"text": "New?", "label": "oos"}], "mine/dev.jsonl")
    status, out = doctor("--data", tmp_path / "mine", "--task", "classify")
    assert status == 2 and "\ndev, row 5: label 'oos' does not occur in the train rows\n" in out
    write_jsonl([*LABELS, {"text": "Sing!", "label": "oos"}], "mine/train.jsonl")
    status, out = doctor("--data", tmp_path / "mine", "--task", "classify", "--oos_label", "oos")
    assert "[refused-row]" not in out and "[rare-label]" not in out and "[unseen-label]" not in out
    assert "train: 1 out-of-scope row is not trained on\n" in out and "\ntrain: 18 rows, " in out and "\ndev: 4 rows, " in out


def test_one_label_stops(doctor, write_jsonl, tmp_path):
    path = write_jsonl([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}, "{}"])
    status, out = doctor("--data", path, "--task", "classify", "--json", tmp_path / "found.json")
    assert status == 2 and re.search(r"^error: the training would stop: the train rows hold one label .*\[stops\]$", out, re.M)
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["findings"][1]["code"] == "stops"


def test_turns_with_a_label(doctor, write_jsonl):
    rows = [{"messages": [{"role": "user", "content": f"{text} {i}", "intent": label}, {"role": "assistant", "content": "Yes."},
                          {"role": "user", "content": "Thanks!", "intent": "thank"}, {"role": "assistant", "content": "Bye."}]}
            for i in range(5) for text, label in (("Where is it?", "status"), ("Are you open?", "hours"))]
    status, out = doctor("--data", write_jsonl(rows), "--task", "classify", "--label", "intent", "--dev_fraction", 0.1)
    assert "\ntrain: 18 labelled turns in 9 rows, " in out and "\ndev: 2 labelled turns in 1 row, " in out
    assert "[duplicate]" not in out and "[conflict]" not in out and "leak-exact" not in out, "dialogues are compared, not their turns"


def test_only_the_column_to_predict_is_judged(doctor, write_jsonl):
    rows = [{**row, "tags": f"only here {i}", "label": "abc"[i % 3]} for i, row in enumerate(LABELS * 2)]
    out = doctor("--data", write_jsonl(rows), "--task", "classify")[1]
    assert "\n  tags: " in out and "values of tags" not in out and "[conflict]" not in out
    rows[0]["label"] = "b"
    assert "[conflict]" in doctor("--data", write_jsonl(rows), "--task", "classify", "--dev_fraction", 0.02)[1]
    assert "values of label" in doctor("--data", write_jsonl([*rows, {"text": "Hm", "label": "d"}]), "--task", "classify")[1]


def test_special_and_unknown_tokens(doctor, write_jsonl):
    path = write_jsonl([*DIALOGUES[1:], {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "Hm."}]}])
    status, out = doctor("--data", path)
    assert re.search(r"^warning: 1 row in \w+ with a special token of the model in the text \(<\|im_end\|>\) \(row 4\)", out, re.M)
    rows = [{**row, "text": row["text"] + " 龘龘龘龘"} for row in LABELS]
    assert "[unknown-token]" in doctor("--data", write_jsonl(rows), "--task", "classify")[1]
    clean = [{"text": "is my order", "label": "a"}, {"text": "my order is", "label": "b"}] * 6
    assert "[unknown-token]" not in doctor("--data", write_jsonl(clean), "--task", "classify")[1]


def test_a_leak_and_a_copy(doctor, write_jsonl, tmp_path):
    write_jsonl([*DIALOGUES, DIALOGUES[1]], "mine/train.jsonl")
    write_jsonl(DIALOGUES[2:3], "mine/dev.jsonl")
    status, out = doctor("--data", tmp_path / "mine")
    assert status == 0 and "leaks between splits: 1 exact\n" in out
    assert doctor("--data", tmp_path / "mine", "--strict")[0] == 1
    assert "row 1 of dev and row 3 of train (row 1); take these rows out of one of the two splits [leak-exact]\n" in out
    assert re.search(r"^warning: 1 of 5 rows in train repeat an earlier row word for word \(row 5\)", out, re.M)


# What is shown


def test_show_marks_what_is_trained_on(doctor, write_jsonl):
    path = write_jsonl(DIALOGUES)
    plain = doctor("--data", path, "--show", 4)[1]
    assert re.search(r"\n--- \w+, row 2 \(\d+ tokens\) ---\n<\|im_start\|>user\n我想退货。<\|im_end\|>\n<\|im_start\|>assistant\n"
                     r"⟦好的，请告诉我订单号。<\|im_end\|>⟧\n", plain) and "\033" not in plain
    coloured = doctor("--data", path, "--show", 4, "--color", "always")[1]
    assert "\033[32m好的，请告诉我订单号。<|im_end|>\033[0m" in coloured and "⟦" not in coloured
    assert re.search(r"row 1 \(76 tokens, shortened to \d+\)", doctor("--data", path, "--show", 4, "--max_length", 60)[1])
    assert "row 1 (76 tokens: left out)" in doctor("--data", path, "--show", 4, "--max_length", 30)[1]


def test_no_colour_where_none_is_wanted(doctor, write_jsonl, monkeypatch):
    path = write_jsonl(DIALOGUES)
    monkeypatch.setattr(script.sys.stdout, "isatty", lambda: True, raising=False)
    assert script.parse(["--data", str(path)]).colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert not script.parse(["--data", str(path)]).colour
    assert script.parse(["--data", str(path), "--color", "always"]).colour, "a flag is stronger than the environment"


def test_control_characters_never_reach_the_terminal(doctor, write_jsonl):
    evil = "\x1b[2J\x1b]0;mine\x07 \r\x9b31m\u202eabc"
    chat_rows = [{"messages": [{"role": "user", "content": f"Hi {evil}"}, {"role": "assistant", "content": f"Yo {evil}"}]}] * 3
    labels = [{"text": f"Hi {evil} {i}", "label": f"{evil}{i % 2}"} for i in range(6)] + [{"text": "x", "label": f"once {evil}"}]
    for rows, task in (([*chat_rows, {"messages": evil}], "chat"), ([*labels, {evil: 1}, {"text": 1, "label": evil}], "classify")):
        out = doctor("--data", write_jsonl(rows), "--task", task, "--show", 1000, "--on_bad_row", "skip")[1]
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", re.sub("Tokenizing.*", "", out)) and "\\x1b[2J" in out
        assert out.count("\n--- ") == (3 if task == "chat" else 7), "all rows, if there are fewer than N"


@pytest.mark.parametrize("task, shown", [
    ("classify", r"\[CLS\] where is my order\? \[SEP\]\n-> ⟦\"order\"⟧"),
    ("tag", r"\[CLS\].*\[SEP\]\n-> day: Friday"),
    ("translate", r"Where is my order\? </s>\n-> ⟦我的订单在哪里？</s>⟧"),
])
def test_show_of_the_other_tasks(task, shown, doctor, write_jsonl):
    out = doctor("--data", write_jsonl(CASES[task][1]), "--task", task, "--show", 99)[1]
    assert re.search(shown, out)
    assert task != "tag" or re.search(r"\[CLS\]⟦.*⟧", out)


def test_the_histogram_fits_a_narrow_terminal(doctor, write_jsonl):
    out = doctor("--data", write_jsonl(DIALOGUES * 30))[1]
    bars = [line for line in out.splitlines() if "█" in line]
    assert bars and max(map(len, bars)) <= 80


# The copy without personal data

PERSONAL = [
    {"id": "a", "messages": [{"role": "user", "content": "我是jo@example.com，手机13812345678"},
                             {"role": "assistant", "content": "收到，稍后打138 1234 5678", "train": False},
                             {"role": "user", "content": "也可以打13912345678"}, {"role": "assistant", "content": "好的"}]},
    {"messages": [{"role": "user", "content": "Mail al@example.com"}, {"role": "assistant", "content": "Done."}],
     "contact": "al@example.com"},
]


def test_the_copy_of_a_file(doctor, write_jsonl, tmp_path):
    path = write_jsonl([*PERSONAL, "{}"])
    before, out = path.read_bytes(), tmp_path / "new" / "copy.jsonl"
    status, printed = doctor("--data", path, "--mask_pii", out, "--on_bad_row", "skip")
    assert status == 0 and path.read_bytes() == before and [entry.name for entry in out.parent.iterdir()] == ["copy.jsonl"]
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [m["content"] for m in rows[0]["messages"]] == [
        "我是[EMAIL_1]，手机[PHONE_1]", "收到，稍后打[PHONE_1]", "也可以打[PHONE_2]", "好的"]
    assert rows[0]["id"] == "a" and rows[0]["messages"][1]["train"] is False and rows[1]["messages"][0]["content"] == "Mail [EMAIL_1]"
    assert rows[1]["contact"] == "[EMAIL_1]", "the same person as in the turns"
    assert "2 rows; masked: e-mail addresses 3, telephone numbers 3\n  1 refused row is not in it\n" in printed
    assert "copied as it is" not in printed
    assert data.read(out, data.check_dialogue).rows == rows
    assert "personal data: none found" in doctor("--data", out)[1]


def test_the_copy_of_a_folder(doctor, write_jsonl, tmp_path):
    write_jsonl(PERSONAL * 2, "shop/train.jsonl")
    (tmp_path / "shop/test.csv").write_text("question,answer\nMail jo@example.com?,Yes\n", encoding="utf-8")
    status, _ = doctor("--data", tmp_path / "shop", "--mask_pii", tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["test.jsonl", "train.jsonl"]
    [row] = data.read(tmp_path / "copy/test.jsonl", data.check_dialogue).rows
    assert row["messages"][0]["content"] == "Mail [EMAIL_1]?"
    assert len(data.read(tmp_path / "copy/train.jsonl", data.check_dialogue).rows) == 4, "held-out rows are train rows in the copy"


def test_what_stays_in_the_copy_is_told(doctor, write_jsonl, tmp_path):
    rows = [{"id": "13812345678", "messages": PERSONAL[0]["messages"], "phone": 13812345678, "by": {"jo@example.com": "jo@example.com"},
             "shop": ["al@example.com", 3, None]}]
    out = doctor("--data", write_jsonl(rows * 2), "--mask_pii", tmp_path / "copy.jsonl", "--columns", "shop=seller")[1]
    assert "error: " in out and "no row has a column 'seller'" in out and not (tmp_path / "copy.jsonl").exists()
    out = doctor("--data", write_jsonl(rows * 2), "--mask_pii", tmp_path / "copy.jsonl")[1]
    for column in ("id", "phone", "by"):
        assert f'  "{column}" is copied as it is, although 2 rows hold personal data in it, as a label, an id, a number or a name: ' in out
    assert out.count("is copied as it is") == 3
    [row, _] = data.read(tmp_path / "copy.jsonl", data.check_dialogue).rows
    assert row["by"] == {"jo@example.com": "[EMAIL_1]"} and row["shop"] == ["[EMAIL_2]", 3, None]


TOOLS = {"messages": [
    {"role": "user", "content": [{"type": "text", "text": "I am jo@example.com, "}, {"type": "text", "text": "13812345678"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": json.dumps(
        {"mail": "jo@example.com", "note": "电话\n13812345678", "by": ["x\n139 1234 5678"]})}}]},
    {"role": "tool", "content": '{"phone": 13812345678}'}, {"role": "assistant", "content": "Found you."}]}


def test_tool_calls_and_parts_are_masked(doctor, write_jsonl, tmp_path):
    doctor("--data", write_jsonl([TOOLS, TOOLS]), "--mask_pii", tmp_path / "copy.jsonl")
    written = (tmp_path / "copy.jsonl").read_text(encoding="utf-8")
    assert "1234" not in written and "jo@" not in written
    messages = data.read(tmp_path / "copy.jsonl", data.check_dialogue).rows[0]["messages"]
    assert messages[0]["content"] == "I am [EMAIL_1], [PHONE_1]" and messages[2]["content"] == '{"phone": [PHONE_1]}'
    assert '"mail": "[EMAIL_1]"' in messages[1]["content"] and "[PHONE_2]" in messages[1]["content"]


def as_parquet(rows: list[dict], path) -> None:
    pq.write_table(pa.Table.from_pylist([{**row, "when": datetime.datetime(2024, 1, 15)} for row in rows]), path)


def as_csv(rows: list[dict], path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("question,answer,note\n" + "".join(f"{row['question']},{row['answer']},{row['note']}\n" for row in rows))


@pytest.mark.parametrize("name, write", [("faq.parquet", as_parquet), ("faq.csv.gz", as_csv)])
def test_copies_of_tables(name, write, doctor, tmp_path):
    rows = [{"question": f"Call 1381234567{i}", "answer": f"Yes 1381234567{i}", "note": f"jo{i}@example.com"} for i in range(5)]
    write(rows, tmp_path / name)
    status, out = doctor("--data", tmp_path / name, "--mask_pii", tmp_path / "one.jsonl")
    assert status == 0 and "5 rows; masked: e-mail addresses 5, telephone numbers 10\n" in out
    copied = list(data.read(tmp_path / "one.jsonl", data.check_dialogue).rows)
    assert len(copied) == 5 and all(row["note"] == "[EMAIL_1]" for row in copied)
    assert {turn["content"] for row in copied for turn in row["messages"]} == {"Call [PHONE_1]", "Yes [PHONE_1]"}
    doctor("--data", tmp_path / "one.jsonl", "--mask_pii", tmp_path / "two.jsonl")
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes(), "masking again changes nothing"


def test_numbers_that_are_spread_over_tokens_are_told(doctor, write_jsonl, tmp_path):
    rows = [*TAGS[:3], {"tokens": ["call", "650", "-", "253", "-", "0000"], "tags": ["O"] * 6},
            {"tokens": ["mail", "jo@example.com"], "tags": ["O", "B-mail"]}]
    found = doctor("--data", write_jsonl(rows), "--task", "tag", "--mask_pii", tmp_path / "copy.jsonl", "--dev_fraction", 0.1)[1]
    assert "masked: e-mail addresses 1\n" in found and "  1 row still holds some, spread over several tokens: train 4\n" in found
    copy = data.read(tmp_path / "copy.jsonl", data.check_tag).rows
    assert copy[4] == {"tokens": ["mail", "[EMAIL_1]"], "tags": ["O", "B-mail"]} and copy[:4] == rows[:4]


def test_nothing_is_overwritten(doctor, write_jsonl, tmp_path):
    path = write_jsonl(PERSONAL)
    (tmp_path / "there.jsonl").write_text("mine", encoding="utf-8")
    status, out = doctor("--data", path, "--mask_pii", tmp_path / "there.jsonl")
    assert status == 2 and "exists already" in out and (tmp_path / "there.jsonl").read_text(encoding="utf-8") == "mine"
    (tmp_path / "file").write_text("", encoding="utf-8")
    status, out = doctor("--data", path, "--mask_pii", tmp_path / "file/copy.jsonl")
    assert status == 2 and "can't be written" in out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "there.jsonl", "train.jsonl"]


# --json


def test_findings_never_replace_the_data(doctor, write_jsonl, tmp_path):
    path, other = write_jsonl(DIALOGUES, "shop/train.jsonl"), write_jsonl(DIALOGUES, "shop/more.jsonl")
    before = path.read_bytes()
    (tmp_path / "link.json").symlink_to(path)
    for out in (path, tmp_path / "shop" / "." / "train.jsonl", tmp_path / "link.json"):
        for data_ in (path, tmp_path / "shop"):
            status, printed = doctor("--data", data_, "--json", out)
            assert status == 2 and printed == f"error: --json {out} is a file of --data, and would replace it: name another\n"
    status, printed = doctor("--data", tmp_path / "shop", "--json", tmp_path / "shop" / "dev.json")
    assert status == 2 and "would be taken for dev rows" in printed
    assert path.read_bytes() == before and sorted(path.parent.iterdir()) == sorted([path, other])
    assert doctor("--data", tmp_path / "shop", "--json", tmp_path / "shop" / "findings.json")[0] == 0
    assert doctor("--data", tmp_path / "shop", "--json", tmp_path / "shop" / "findings.json")[0] == 0, "older findings may be replaced"


@pytest.mark.parametrize("flag", ["--json", "--mask_pii"])
def test_a_name_that_cannot_be_written_is_refused_before_anything_is_read(flag, doctor, write_jsonl, tmp_path, monkeypatch):
    path = write_jsonl(DIALOGUES)
    (tmp_path / "folder").mkdir()

    def full(dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "read", None)
    for out in ("folder", "train.jsonl/new.jsonl", "n" * 300 + ".jsonl", "/dev/null"):
        status, printed = doctor("--data", path, flag, tmp_path / out)
        assert status == 2 and printed.startswith(f"error: {flag} {tmp_path / out}") and printed.count("\n") == 1
    monkeypatch.setattr(script.tempfile, "TemporaryFile", full)
    status, printed = doctor("--data", path, flag, tmp_path / "new.jsonl")
    assert status == 2 and printed == f"error: {flag} {tmp_path / 'new.jsonl'} can't be written (No space left on device): name another\n"
    assert doctor("--data", path, "--json", tmp_path / "x.jsonl", "--mask_pii", tmp_path / "x.jsonl")[0] == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "train.jsonl"]


def test_findings_hold_no_personal_data(doctor, write_jsonl, tmp_path):
    phone, mail = "13812345678", "jo@example.com"
    texts = [f"I am {mail}", "My\n" + phone, "4111 1111 1111 1111", f"{'x' * 45} {phone}", f"{'好' * 50}{phone}", f"{'x ' * 25}{mail}"]
    bad = [[text, {"role": text}, {"messages": text}, {"messages": [text]}, {"messages": [{"role": text, "content": "x"}]},
            {"messages": [{"role": "user", "content": [text]}]}, {text: 1}, '{"a": "' + text] for text in texts]
    doctor("--data", write_jsonl([*DIALOGUES, *sum(bad, [])]), "--json", tmp_path / "chat.json")
    labels = [{"text": f"Question {i}", "label": text} for i, text in enumerate([mail, phone] * 6)] + [{"text": "x", "label": [phone]}]
    doctor("--data", write_jsonl(labels), "--task", "classify", "--json", tmp_path / "classify.json")
    for name, kinds in (("chat.json", ("EMAIL", "PHONE", "BANK_CARD")), ("classify.json", ("EMAIL", "PHONE"))):
        written = (tmp_path / name).read_text(encoding="utf-8")
        for secret in (phone, phone[:7], mail, mail[:5], "4111"):
            assert secret not in written, re.findall(f".*{re.escape(secret)}.*", written)
        assert all(f"[{kind}_1]" in written for kind in kinds)


# Flags


@pytest.mark.parametrize("words, complaint", [
    (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: no such file or folder"),
    (["--label", "intent"], "--label is for --task classify; this is --task chat"),
    (["--threshold", "0"], "--threshold 0: use a number from 0.1 to 1"),
    (["--dev_fraction", "1"], "--dev_fraction 1.0 is no share"),
    (["--json", "no/such/folder/x.json"], "name a file in a folder that exists"),
    (["--data", "a", "b", "--mask_pii", "x"], "--mask_pii copies one source"),
    (["--data", str(ROOT / "data/customer_service/dev.jsonl"), "--mask_pii", "x.csv"], "name a .jsonl file"),
    (["--columns", "a"], "write NEW=OLD"),
    (["--data", "x" * 300], f"error: {'x' * 80}... is too long for the name of a file"),
    (["--json", "x" * 300 + ".json"], "can't be written (File name too long)"),
    (["--shw", "3"], "--help lists the flags"),
    (["--max_length", "4000"], "exceeds the 256 tokens"),
])
def test_flags_that_cannot_be_obeyed(words, complaint, doctor):
    status, out = doctor(*words)
    assert status == 2 and complaint in out and "Traceback" not in out


# Before every training


def test_every_training_begins_with_the_short_form(tiny, write_jsonl, capsys):
    path = write_jsonl([*PERSONAL, *DIALOGUES, *DIALOGUES])
    told = loaded({"data": [str(path)]}, tiny("llama"), dev_fraction=0.5).report["doctor"]
    assert told["leaks"] + told["duplicates"] == 4 and told["leaks"] > 0, "each dialogue of DIALOGUES stands there twice"
    assert sum(split["rows"].get("EMAIL", 0) for split in told["personal_data"].values()) == 2
    printed = capsys.readouterr().out
    assert f"doctor:\n  {told['sentences'][0]}\n" in printed and printed.endswith(f"  details: {told['details']}\n")
    assert loaded({"data": [str(write_jsonl(DIALOGUES[1:], 'good.jsonl'))]}, tiny("llama")).report["doctor"]["sentences"] == []
    assert "doctor:" not in capsys.readouterr().out


def test_its_command_asks_the_same_of_the_same_rows(tiny, write_jsonl):
    flags = {"data": [f"{write_jsonl(LABELS)}:0.5", f"{write_jsonl(LABELS, 'b c.jsonl')}:2"], "task": "classify", "oos_label": "hours",
             "dev_fraction": 0.3, "max_length": 32}
    task = loaded(flags, tiny("bert"), context_turns=2)
    assert task.report["doctor"]["duplicates"] is None, "weights repeat rows"
    words = shlex.split(task.report["doctor"]["details"])
    assert words[:2] == ["python", "scripts/doctor.py"]
    options = script.parse(words[2:])
    assert {name: getattr(options.shared, name) for name in (*flags, "context_turns", "model")} == flags | {
        "context_turns": 2, "model": str(tiny("bert"))}
    shared = args.SharedArguments(data=["x"], multi_label=True, task="classify")
    options = script.parse(shlex.split(tasks.doctor_command(shared, 7))[2:])
    assert isinstance(options, argparse.Namespace) and options.shared.multi_label and options.seed == 7
