"""Rows and features on disk: the same rows, features and counts as in memory, by any number of processes, and again from the cache."""

import hashlib
import json
import shlex

import pytest
from conftest import DIALOGUES

from recipes import lora
from recipes.common import args, tasks


def put(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def chats(n, name="q"):
    """n dialogues that differ in length and number of turns, half of them Chinese."""
    return [{"messages": [turn for t in range(1 + i % 4) for turn in (
        {"role": "user", "content": f"{name}{i} " + ("我的包裹在哪里？" if i % 2 else "Where is it? ") * (1 + (i * 7 + t) % 9)},
        {"role": "assistant", "content": ("请稍等。" if i % 2 else "One moment. ") * (1 + (i + t) % 5)})]} for i in range(n)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Small sources of every task, in the current folder, so that no path is in a report."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.jsonl", [*chats(20), "{", *chats(20, "r"), {"messages": []}])
    put(tmp_path / "b.jsonl", [{"prompt": f"问题{i}", "response": f"答案{i}", "note": i, "more": [None, 1.5]} for i in range(15)]
        + DIALOGUES)
    (tmp_path / "c").mkdir()
    put(tmp_path / "c" / "train.jsonl", chats(9, "c"))
    put(tmp_path / "c" / "dev.jsonl", chats(5, "d"))
    put(tmp_path / "labels.jsonl", [{"text": f"Text {i} " * (1 + i % 40), "label": ["yes", "no", "other"][i % 3]} for i in range(40)]
        + [{"text": "?", "label": "rare"}])
    put(tmp_path / "turns.jsonl", [{"messages": [
        {"role": "user", "content": f"Hi {i}", "intent": "greet"}, {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": f"Bye {i}", "intent": "leave"}], "language": "en"} for i in range(8)])
    put(tmp_path / "lists.jsonl", [{"text": f"Text {i}", "label": [["yes"], [], ["yes", "no"], ["no"]][i % 4]} for i in range(20)])
    put(tmp_path / "tags.jsonl", [{"tokens": ["fly", "to", "上", "海"] * (1 + i % 30),
                                   "tags": ["O", "O", "B-city", "I-city"] * (1 + i % 30)} for i in range(20)])
    put(tmp_path / "pairs.jsonl", [{"source": "Hello " * (1 + i % 30), "target": "你好" * (1 + i % 50)} for i in range(20)]
        + [{"source": "a", "refs": ["b", "c"]}])
    return tmp_path


# What the flags ask for: a digest of the features of each split, and of the report on the rows. Recorded before rows went to disk.
GOLDEN = {
    "gpt2 --data a.jsonl --on_bad_row skip --max_length 120":
        ("f64a4d301f65", "3d29d4fce26a", "3343b26a6d9d"),
    "llama --data a.jsonl:0.7 b.jsonl:0.3 --on_bad_row skip --seed 7 --dev_fraction 0.2":
        ("454eb5af7a8c", "5ed6c181117d", "7b19f5b477be"),
    "llama --data a.jsonl:0.1 b.jsonl:0.9 --on_bad_row skip --max_train_samples 21 --max_eval_samples 2":
        ("58b41899e097", "36770519689e", "e5134670d3d5"),
    "llama --data b.jsonl c --replay a.jsonl:0.3 --on_bad_row skip":
        ("f970cdd67285", "eaa0e00bb19c", "3285229d0ec8", "239fa3db5de3"),
    "llama --data c --measure_forgetting b.jsonl":
        ("dbc5f6e0d744", "8ae5166f3dcf", "cd98ccbf2c2d", "d819fc17bc58"),
    "llama --data c --replay b.jsonl:0.5 --max_train_samples 10":
        ("0d0b83b19f98", "8ae5166f3dcf", "cc53da23d9bd", "d819fc17bc58"),
    "bert --task classify --data labels.jsonl --oos_label other --class_weights balanced --max_length 40 --on_bad_row skip":
        ("1425b84e3505", "23e11d69954d", "02fc1378bd36"),
    "bert --task classify --data turns.jsonl --label intent --context_turns 1":
        ("d4839990b56d", "ef720e4b683f", "ac12a75d7398"),
    "bert --task classify --data lists.jsonl --multi_label":
        ("204a4fba924d", "cb8b557347d6", "860666333ae7"),
    "bert --task tag --data tags.jsonl --max_length 40":
        ("eda17d6ca395", "c0fbf294b78e", "8b423d8f274c"),
    "llama --task tag --data tags.jsonl --max_length 40":
        ("ffe1bcc87cdd", "5898f4056b2f", "811fe6fa55cb"),
    "t5 --task translate --data pairs.jsonl --max_length 40 --source_prefix 'to Chinese: '":
        ("d3ce30ba3467", "64499010d23d", "488cd50883f7"),
    "llama --task translate --data pairs.jsonl --max_length 60":
        ("64000fd62f93", "add5c7913cd3", "815cf2527c09"),
}


def load(tiny, model, *flags):
    """The task that these flags ask for."""
    argv = ["--model", str(tiny(model)), "--use_cpu", "--bf16", "False", "--report_to", "none", "--output_dir", "run", *flags]
    return tasks.load(*args.parse("", lora.MethodArguments, argv))


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:12]


def digests(task) -> tuple[str, ...]:
    """Of the train features, the dev features, the report, and the old features where there are any. With tokens for their ids, which
    another build of the tiny tokenizers may number otherwise."""
    report = {name: value for name, value in task.report.items() if name != "tokenized"}
    features = [[row | {"input_ids": task.tokenizer.convert_ids_to_tokens(row["input_ids"])} for row in part or ()]
                for part in (task.train, task.dev, task.old)]
    if task.name in ("chat", "translate"):  # their labels are ids as well
        features = [[row | {"labels": [i if i < 0 else task.tokenizer.convert_ids_to_tokens(i) for i in row["labels"]]} for row in part]
                    for part in features]
    return tuple(digest(part) for part in (features[0], features[1], report, features[2]) if part)


@pytest.mark.parametrize("flags", GOLDEN, ids=str)
def test_features_and_counts_are_those_of_rows_in_memory(flags, folder, tiny):
    assert digests(load(tiny, *shlex.split(flags))) == GOLDEN[flags]


