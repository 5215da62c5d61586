"""Rows and features on disk: the same rows, features and counts as in memory, by any number of processes, and again from the cache."""

import hashlib
import itertools
import json
import os
import pickle
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from conftest import DIALOGUES, ROOT, tiny_config, tiny_tokenizer
from datasets import IterableDataset
from test_cli import shell
from test_methods import run_recipe
from test_resume import Interrupted, Killed, curve, same, trained
from tokenizers.models import WordPiece
from transformers import BertForPreTraining

from recipes import full, lora
from recipes.common import args, chat, data, disk, encoding, runs, streaming, tasks
from recipes.common.errors import UserError


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


# What the flags ask for: a digest of the features of each split, and of the report on the rows. Recorded with rows in memory.
GOLDEN = {
    "gpt2 --data a.jsonl --on_bad_row skip --max_length 120":
        ("f64a4d301f65", "3d29d4fce26a", "ed48598b794b"),
    "llama --data a.jsonl:0.7 b.jsonl:0.3 --on_bad_row skip --seed 7 --dev_fraction 0.2":
        ("454eb5af7a8c", "5ed6c181117d", "27a64482c71e"),
    "llama --data a.jsonl:0.1 b.jsonl:0.9 --on_bad_row skip --max_train_samples 21 --max_eval_samples 2":
        ("58b41899e097", "36770519689e", "2d17e598e207"),
    "llama --data b.jsonl c --replay a.jsonl:0.3 --on_bad_row skip":
        ("f970cdd67285", "eaa0e00bb19c", "10030e958ba6", "239fa3db5de3"),
    "llama --data c --measure_forgetting b.jsonl":
        ("dbc5f6e0d744", "8ae5166f3dcf", "ba0dc43847a7", "d819fc17bc58"),
    "llama --data c --replay b.jsonl:0.5 --max_train_samples 10":
        ("0d0b83b19f98", "8ae5166f3dcf", "6d358b218a28", "d819fc17bc58"),
    "bert --task classify --data labels.jsonl --oos_label other --class_weights balanced --max_length 40 --on_bad_row skip":
        ("1425b84e3505", "23e11d69954d", "559336e4feeb"),
    "bert --task classify --data turns.jsonl --label intent --context_turns 1":
        ("d4839990b56d", "ef720e4b683f", "4fd0f5d91d34"),
    "bert --task classify --data lists.jsonl --multi_label":
        ("204a4fba924d", "cb8b557347d6", "1f8e738785c2"),
    "bert --task tag --data tags.jsonl --max_length 40":
        ("eda17d6ca395", "c0fbf294b78e", "c4c04565d0a5"),
    "llama --task tag --data tags.jsonl --max_length 40":
        ("ffe1bcc87cdd", "5898f4056b2f", "037430a5b750"),
    "t5 --task translate --data pairs.jsonl --max_length 40 --source_prefix 'to Chinese: '":
        ("d3ce30ba3467", "64499010d23d", "6d4aeb4684af"),
    "llama --task translate --data pairs.jsonl --max_length 60":
        ("64000fd62f93", "add5c7913cd3", "52377925b654"),
    "llama --data a.jsonl --on_bad_row skip --train_fraction 0.5 --max_tokens 900 --tokens_per_step 500":
        ("4628e555dd41", "239fa3db5de3", "0d2fd8f90d5f"),
    "llama --data c --replay b.jsonl:0.5 --max_train_samples 10 --train_fraction 0.7":
        ("dde9abd062c2", "8ae5166f3dcf", "23fe59cf9107", "d819fc17bc58"),
    "llama --task pretrain --data labels.jsonl --columns 'topic=label' --max_length 40":
        ("f2ef7571a125", "5221bda1de9e", "062404110ee3"),
    "gpt2 --task pretrain --data a.jsonl turns.jsonl --on_bad_row skip --train_fraction 0.6":
        ("01377b91a706", "1fe64645484a", "6368ea350bf1"),
    "letters --task pretrain --data a.jsonl labels.jsonl --on_bad_row skip --max_length 30":
        ("c5038d9cc31c", "e978dee6731d", "7b5b8f06973c"),
    "letters --task pretrain --data a.jsonl labels.jsonl --on_bad_row skip --next_sentence":
        ("c45f538f13d8", "9148d6077335", "6073aec9eade"),
    "gpt2 --recipe full --task pretrain --data labels.jsonl --from_scratch --vocab_size 300 --max_train_samples 30":
        ("92312eacfe84", "3b643d5a7540", "6fa383253a87"),
}


def load(tiny, model, *flags):
    """The task that these flags ask for."""
    recipe, flags = (full, flags[2:]) if flags[:2] == ("--recipe", "full") else (lora, flags)
    argv = ["--model", str(tiny(model)), "--use_cpu", "--bf16", "False", "--report_to", "none", "--output_dir", "run", *flags]
    return tasks.load(*args.parse("", recipe.MethodArguments, argv))


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:12]


def digests(task) -> tuple[str, ...]:
    """Of the train features, the dev features, the report, and the old features where there are any. With tokens for their ids, which
    another build of the tiny tokenizers may number otherwise, and draw others of."""
    report = {name: value for name, value in task.report.items() if name != "tokenized"}
    report["doctor"] = {name: value for name, value in report["doctor"].items() if name != "details"}
    features = [[row | {"input_ids": task.tokenizer.convert_ids_to_tokens(row["input_ids"])} for row in part or ()]
                for part in (task.train, task.dev, task.old)]
    if task.name in ("chat", "translate") or (task.name, task.peft_type) == ("pretrain", "CAUSAL_LM"):  # their labels are ids as well
        features = [[row | {"labels": [i if i < 0 else task.tokenizer.convert_ids_to_tokens(i) for i in row["labels"]]} for row in part]
                    for part in features]
    elif task.name == "pretrain":
        features[1] = [row["bytes"] for row in features[1]]
    return tuple(digest(part) for part in (features[0], features[1], report, features[2]) if part)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A tiny BERT that reads letter by letter: how a vocabulary is trained, ties among its pieces included, has no part in it."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".?0123456789abcdefghijklmnoprstuvwxyz请稍等我的包裹在哪里",
                  *(f"##{letter}" for letter in "0123456789abcdefghijklmnoprstuvwxyz")]
    path = tmp_path_factory.mktemp("letters")
    tokenizer = tiny_tokenizer("bert")
    tokenizer.backend_tokenizer.model = WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer.save_pretrained(path)
    BertForPreTraining(tiny_config("bert", len(vocabulary))).save_pretrained(path)
    return path


@pytest.mark.parametrize("flags", GOLDEN, ids=str)
def test_features_and_counts_are_those_of_rows_in_memory(flags, folder, tiny, letters):
    make = lambda kind: letters if kind == "letters" else tiny(kind)  # noqa: E731
    assert digests(load(make, *shlex.split(flags))) == GOLDEN[flags]




# ----------------------------------------------------------------------------------------------------------- rows on disk


def test_stored_rows_are_like_a_list():
    rows = [{"n": n, "text": "你好" * n, "more": [None, {"a": 1.5, "b": (n, {n})}]} for n in range(2500)]  # more than two chunks
    stored = disk.store(iter(rows))
    assert len(stored) == 2500 and stored == rows and list(stored) == rows and stored[-1] == rows[-1]
    assert stored[990:1010] == rows[990:1010] and stored[:None] == rows and stored[3000:] == []
    assert stored.take([7, 7, 2499]) == [rows[7], rows[7], rows[2499]]
    both = stored[2:4] + disk.store(rows[:1]).take([0, 0])
    assert both == [rows[2], rows[3], rows[0], rows[0]] and both[1:].take([2]) == [rows[0]]
    assert stored != rows[:-1] and stored[:1] != rows[1:2]
    assert disk.store([]) == [] and disk.store([]) + stored[:1] == rows[:1] and not disk.store([])
    with pytest.raises(IndexError):
        stored[2500]
    sent = pickle.dumps(stored.take([2499, 3, 3]))
    assert pickle.loads(sent) == [rows[2499], rows[3], rows[3]] and len(sent) < 20_000, "to another process goes no other row"


def test_a_full_disk_is_told(monkeypatch):
    def full(self, batch):
        raise OSError(28, "No space left on device")

    class Full:
        write_batch = full

    monkeypatch.setattr(pa.ipc, "new_stream", lambda *_: Full())
    with pytest.raises(UserError, match=r"can't hold the rows \(No space left on device\): name a folder on a larger disk"):
        disk.store([{"a": 1}])


def test_a_lone_surrogate_is_found_anywhere():
    for text in ("\ud800", "a\udfff", "\udbff\udc00"):
        assert data.shapes.half_a_character(text)
    assert not data.shapes.half_a_character("a\ud7ff\ue000😊")


# ------------------------------------------------------------------------------------------------------ several processes


def double(row):
    if row["n"] == 2600:
        raise encoding.Refused("too many", "ask for less")
    return (None if row["n"] % 1000 == 7 else {"input_ids": [row["n"]] * 2, "empty": []}), {"seen": 1, "even": row["n"] % 2 == 0}


def dies(row):
    os.kill(os.getpid(), 9)


@pytest.fixture(scope="module")
def many():
    return disk.store({"n": n} for n in range(3300))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_gives_the_same(many, processes):
    features, counts, left_out, refused = encoding.encode(many, "rows.jsonl", double, "row", "skip", processes)
    kept = [n for n in range(3300) if n % 1000 != 7 and n != 2600]
    assert list(features) == [{"input_ids": [n, n], "empty": []} for n in kept]
    assert counts == {"seen": 3299, "even": 1649} and left_out == [8, 1008, 2008, 3008] and refused == {2601: "row 2601: too many"}
    with pytest.raises(UserError, match=r"^rows.jsonl, row 2601: too many \(ask for less\)$"):
        encoding.encode(many, "rows.jsonl", double, "row", "stop", processes)


def test_a_process_that_is_killed_is_told(many):
    with pytest.raises(UserError, match="ended from outside, most likely for want of memory: use fewer with --preprocessing_num_workers"):
        encoding.encode(many, "rows.jsonl", dies, "row", "skip", 2)


class Row(dict):
    """A row that knows how many of its kind are in memory."""

    alive = most = 0

    def __init__(self, *given):
        super().__init__(*given)
        Row.alive += 1
        Row.most = max(Row.most, Row.alive)

    def __del__(self):
        Row.alive -= 1

    def __reduce__(self):
        return Row, (dict(self),)


def test_twenty_thousand_rows_are_never_all_in_memory(tmp_path, monkeypatch):
    """Counted, not timed: rows are read, checked, stored and tokenized with no more of them alive than some chunks."""
    monkeypatch.setattr(data.shapes, "dialogue", lambda row, pairs: (Row(row), None))
    put(tmp_path / "a.jsonl", ({"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yo"}]} if i % 100
                               else {"messages": []} for i in range(20_000)))
    read = data.read(tmp_path / "a.jsonl", data.check_dialogue, "skip")
    assert len(read.rows) == 19_800 and len(read.skipped) == 200 and 1 <= Row.most <= 4
    features, counts, left_out, refused = encoding.encode(
        read.rows, "a.jsonl", lambda row: ({"input_ids": [len(row["messages"][0]["content"])]}, {"n": 1}), "row", "stop", 1)
    assert len(features) == counts["n"] == 19_800 and not left_out and not refused and 1 <= Row.most <= 4
    kept = list(read.rows)
    assert Row.most == len(kept) == 19_800, "the count does see rows that are kept"


# -------------------------------------------------------------------------------------------------------------- the cache


def test_the_second_run_starts_from_the_cache(folder, tiny, capsys, monkeypatch):
    flags = ("llama", "--data", "a.jsonl", "--on_bad_row", "skip", "--replay", "b.jsonl:0.2")
    first = load(tiny, *flags)
    assert "from the cache" not in capsys.readouterr().out and not first.report["tokenized"]["from_cache"]
    with monkeypatch.context() as patch:
        patch.setattr(data, "read", None)  # no row is read again
        patch.setattr(chat, "encode", None)
        second = load(tiny, *flags, "--r_drop", "1", "--learning_rate", "0.1", "--preprocessing_num_workers", "1")
    out = capsys.readouterr().out
    assert f"tokenized rows from the cache, as neither they nor what reads them has changed: {first.report['tokenized']['folder']}" in out
    assert "skipped row 21: broken JSON" in out and second.report["tokenized"]["from_cache"]
    assert second.report["splits"]["train"]["files"] == [{"name": "a.jsonl", "read": 42, "kept": 40, "refused": 2},
                                                         {"name": "b.jsonl", "read": 19, "kept": 19, "refused": 0}]
    assert digests(second) == digests(first)


@pytest.mark.parametrize("change", ["byte", "seed", "max_length", "template", "code", "context"])
def test_what_changes_the_rows_or_their_reading_is_never_taken_from_the_cache(folder, tiny, change, monkeypatch, tmp_path_factory):
    load(tiny, "llama", "--data", "c")
    flags = {"seed": ("--seed", "7"), "max_length": ("--max_length", "99"), "context": ("--dev_fraction", "0.2")}.get(change, ())
    if change == "byte":
        path = folder / "c" / "dev.jsonl"
        path.write_text(path.read_text(encoding="utf-8").replace("d3", "d4"), encoding="utf-8")
    if change == "code":
        monkeypatch.setattr(disk, "_code", lambda: "another")
    if change == "template":
        model = tmp_path_factory.mktemp("model") / "llama"
        shutil.copytree(tiny("llama"), model)
        tokenizer = tiny_tokenizer("llama")
        tokenizer.chat_template = tokenizer.chat_template.replace("\n", " ")
        tokenizer.save_pretrained(model)
        tiny = {"llama": model}.__getitem__
    assert not load(tiny, "llama", "--data", "c", *flags).report["tokenized"]["from_cache"]


@pytest.mark.parametrize("damage", ["a bit", "the end", "a file", "the record"])
def test_a_damaged_entry_is_made_anew(folder, tiny, damage, capsys):
    first = load(tiny, "llama", "--data", "c")
    entry = Path(first.report["tokenized"]["folder"])
    wanted, path = digests(first), entry / ("entry.json" if damage == "the record" else "train.arrow")
    del first
    content = bytearray(path.read_bytes())
    path.unlink()  # a new file, as the old one may still be mapped into memory
    if damage == "a bit":
        content[len(content) // 2] ^= 1
    if damage != "a file":
        path.write_bytes(content[: -9 if damage in ("the end", "the record") else None])
    capsys.readouterr()
    again = load(tiny, "llama", "--data", "c")
    assert "are damaged (" in capsys.readouterr().out and not again.report["tokenized"]["from_cache"] and digests(again) == wanted
    assert load(tiny, "llama", "--data", "c").report["tokenized"]["from_cache"]


def test_an_entry_that_is_interrupted_leaves_nothing(folder, tiny, monkeypatch):
    before = set(disk.cache().iterdir())

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            load(tiny, "llama", "--data", "c", "--dev_fraction", "0.34")
    assert set(disk.cache().iterdir()) == before


def test_what_is_not_read_of_a_source_is_told_and_counted(folder, tiny, capsys):
    put(folder / "c" / "extra.jsonl", chats(1))
    for _ in range(2):  # from the cache, too
        report = load(tiny, "llama", "--data", "c", "a.jsonl", "--on_bad_row", "skip").report
        assert report["not_read"] == {"count": 1, "names": {"c": ["extra.jsonl"]}}
        assert "note: c holds 1 more file or split, which is not read: extra.jsonl" in capsys.readouterr().out
    report = load(tiny, "llama", "--data", "c", "--split", "train=extra").report
    assert report["splits"]["train"]["rows"] == 1 and report["not_read"]["names"] == {"c": ["train.jsonl"]}


def test_a_row_that_the_model_refuses_is_named_as_in_its_file(folder, tiny):
    """A dev row with a label that the train rows lack, from the middle of a file with blank lines."""
    rows = [{"text": f"Text {i}", "label": ["yes", "no"][i % 2]} for i in range(30)]
    put(folder / "train.csv", ["text,label", *(f"{row['text']},{row['label']}\n" for row in rows)])
    put(folder / "other.jsonl", ["", *rows, "", {"text": "So?", "label": "alone"}])
    for seed in range(9):
        with pytest.raises(UserError) as caught:
            load(tiny, "bert", "--task", "classify", "--data", "train.csv", "other.jsonl", "--dev_fraction", "0.9", "--seed", str(seed))
        if "does not occur" in str(caught.value):
            break
    assert str(caught.value).startswith("other.jsonl, row 33: label 'alone' does not occur in the train rows")


# -------------------------------------------------------------------------------------------------------------- streaming

STEPS = ("--streaming", "--max_steps", "12", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--logging_steps",
         "1", "--save_steps", "2", "--eval_steps", "4", "--load_best_model_at_end", "False", "--max_eval_samples", "3", "--shuffle_buffer",
         "4", "--dropout", "0.1", "--learning_rate", "0.01", "--on_bad_row", "skip")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Three rows for dev, and 11 of which one is broken and three have too long a last answer: 24 rows to train on take several passes."""
    path = tmp_path_factory.mktemp("stream") / "a.jsonl"
    endless = {"messages": [{"role": "user", "content": "x" * 999}, {"role": "assistant", "content": "y"}]}
    put(path, [*chats(3, "dev"), *chats(4), "{", endless, *chats(5, "r")])
    return path


@pytest.mark.parametrize("recipe", ["lora", "adalora"])
def test_a_stream_that_is_interrupted_and_resumed_equals_one_that_is_not(long, tiny, tmp_path, recipe, capsys):
    steps = STEPS if recipe == "lora" else (*STEPS, "--init_rank", "4", "--target_rank", "2", "--every", "1", "--last_share", "0.2")
    through = run_recipe(recipe, tiny("gpt2"), long, tmp_path / "through", *steps)
    out = capsys.readouterr().out
    assert "streamed, shuffled among 4 rows at a time" in out and f"skipped {long}, row 8: broken JSON" in out
    assert f"skipped {long}, row 9: exceeds --max_length 150" in out
    with pytest.raises(Killed):
        run_recipe(recipe, tiny("gpt2"), long, tmp_path / "run", *steps, trainer_class=Interrupted)
    resumed = run_recipe(recipe, tiny("gpt2"), long, tmp_path / "run", *steps, "--resume_from_checkpoint")
    assert len(curve(through, "loss")) == 12 and len(curve(through, "eval_loss")) == 3
    for key in ("loss", "grad_norm", "eval_loss"):
        assert curve(resumed, key) == curve(through, key)
    assert same(trained(resumed.model), trained(through.model))
    splits = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["data"]["splits"]
    assert splits["train"]["kept"] == 24 and splits["train"]["rows"] == 24 + splits["train"]["skipped"] and splits["dev"]["rows"] == 3


def stream(path, one, processes=1, buffer=4, held_out=0, **more):
    report = {"source": str(path)}
    shared = SimpleNamespace(on_bad_row="stop", max_length=9, shuffle_buffer=buffer, **more)
    read = lambda skipped: streaming.rows([data.formats.identify(path, whole=False)], data.check_pretrain, None, "stop", skipped)  # noqa: E731
    return [streaming.Stream(read, one, report, shared, held_out, 3, process, processes) for process in range(processes)]


def texts(streams, n):
    return [[feature["input_ids"] for feature in itertools.islice(own, n)] for own in streams]


def test_each_pass_has_every_row_once_in_another_order_and_the_processes_share_them(tmp_path):
    put(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(20)])
    one = lambda row: ({"input_ids": row["text"]}, {})  # noqa: E731
    [alone] = texts(stream(tmp_path / "a.jsonl", one, held_out=2), 36)
    wanted = {str(i) for i in range(2, 20)}
    assert len(set(alone[:18])) == 18 and set(alone[:18]) == set(alone[18:]) == wanted
    assert alone[:18] != alone[18:] != sorted(wanted, key=int)
    assert texts(stream(tmp_path / "a.jsonl", one, held_out=2), 36) == [alone], "the same again"
    shares = texts(stream(tmp_path / "a.jsonl", one, processes=3, held_out=2), 6)
    assert sorted(sum(shares, [])) == sorted(wanted) and shares == [alone[process:18:3] for process in range(3)]


def test_a_stream_without_a_row_to_train_on_is_told(tmp_path):
    put(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    for one, held_out in ((lambda row: (None, {}), 0), (lambda row: ({}, {}), 2)):
        with pytest.raises(UserError, match=r"a\.jsonl: no row is left to train on"):
            next(iter(stream(tmp_path / "a.jsonl", one, held_out=held_out)[0]))


def test_a_stream_whose_dev_rows_may_have_copies_is_told(tmp_path):
    put(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c", "augmented": {"from": 1, "method": "swap"}}])
    one = lambda row: ({"input_ids": row["text"]}, {})  # noqa: E731
    with pytest.raises(UserError, match=r"a\.jsonl holds altered copies of its rows"):
        texts(stream(tmp_path / "a.jsonl", one, held_out=1), 2)
    assert len(texts(stream(tmp_path / "a.jsonl", one), 3)[0]) == 3


def test_a_bad_row_of_a_stream_is_told_when_it_comes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": 5}\n')
    own = iter(stream(path, lambda row: (row, {}), buffer=1)[0])
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: .*text.*\(--on_bad_row skip"):
        [next(own) for _ in range(2)]
    path.write_bytes(b'{"text": "a"}\n' * 2000 + b'{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, after row \d+: no utf-8 text \(byte 0xe9\); save the file as UTF-8"):
        list(itertools.islice(stream(path, lambda row: (row, {}), buffer=1)[0], 3000))


def test_a_stream_of_the_hub_is_read_like_a_file():
    split = IterableDataset.from_generator(lambda: iter([{"text": "a", "none": None}, {"text": "b", "none": None}]))
    file = data.hub_split(split, "some/set (train)", whole=False)
    assert [row for _, row in streaming.rows([file], data.check_pretrain, None, "stop", None)] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("flags, said", [
    ((), "say how long to train with --max_steps N"),
    (("--max_steps", "3", "--replay", "b.jsonl:0.5"), "--replay needs to know all rows"),
    (("--max_steps", "3", "--max_train_samples", "5"), "--max_train_samples needs to know all rows"),
    (("--max_steps", "3", "--dataloader_num_workers", "2"), "--dataloader_num_workers: the process that trains reads the stream"),
    (("--max_steps", "3", "--train_sampling_strategy", "group_by_length"), "a stream comes in its own order"),
    (("--max_steps", "3", "--data", "a.jsonl:0.5", "b.jsonl:0.5"), "leave the weights out"),
    (("--max_steps", "3", "--data", "a.json"), "a.json can only be read whole"),
    (("--max_steps", "3", "--task", "classify", "--data", "labels.jsonl"), "--task classify must know all rows before it begins"),
])
def test_what_a_stream_can_not_do_is_told(folder, tiny, flags, said):
    (folder / "a.json").write_text(json.dumps(chats(3), indent=1), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        load(tiny, "bert" if "classify" in flags else "llama", "--data", "b.jsonl", "--streaming", *flags)


def test_dev_rows_of_a_stream_come_from_the_dev_file_where_there_is_one(folder, tiny):
    task = load(tiny, "llama", "--data", "c", "--streaming", "--max_steps", "3")
    assert len(task.dev) == 5 and task.train.held_out == 0 and not hasattr(task.train, "__len__")
    pairs = load(tiny, "t5", "--task", "translate", "--data", "pairs.jsonl", "--streaming", "--max_steps", "3", "--max_eval_samples", "4")
    assert len(pairs.dev) == 4 and next(iter(pairs.train))["input_ids"]
    assert runs.steps(0, SimpleNamespace(max_steps=3)) == 3


def in_two_processes(tiny, path, out, *flags):
    """run.json of a run of a real group of two."""
    result = shell(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", ROOT / "recipes/lora.py",
                   "--model", tiny("llama"), "--data", path, "--output_dir", out, "--max_length", "150", "--use_cpu", "--bf16", "False",
                   "--report_to", "none", *flags, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    assert result.code == 0, result.err[-3000:]
    return json.loads((out / "run.json").read_text(encoding="utf-8")), result.out


def test_two_processes_share_a_stream_and_go_on_with_it(tiny, tmp_path):
    """Each step has the rows that one process would take, so none is read by both; and a run that goes on equals one that never stopped."""
    path = tmp_path / "a.jsonl"
    put(path, [*chats(3, "dev"), *chats(32)[::4], "{"])  # 8 rows to train on, all of them short
    flags = (*STEPS, "--dropout", "0", "--save_total_limit", "9")
    alone = run_recipe("lora", tiny("llama"), path, tmp_path / "alone", *flags, "--gradient_accumulation_steps", "4")
    two, told = in_two_processes(tiny, path, tmp_path / "two", *flags)
    resumed, _ = in_two_processes(tiny, path, tmp_path / "on", *flags, "--resume_from_checkpoint", tmp_path / "two" / "checkpoint-6")
    losses = [[entry["loss"] for entry in record["history"] if "loss" in entry] for record in (two, resumed)]
    assert losses[0] == pytest.approx(list(curve(alone, "loss").values()), rel=1e-5) and len(losses[0]) == 12
    assert losses[0] == losses[1] and two["metrics"]["dev_loss"] == resumed["metrics"]["dev_loss"]
    assert told.count("streamed, shuffled among 4 rows at a time; the counts are those of the first of 2 processes") == 1
    assert two["data"]["splits"]["train"]["kept"] == 24 and not two["data"]["splits"]["train"]["left_out"]


# -------------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("turns", [*(row["messages"] for row in DIALOGUES), [{"role": "user", "content": "Hi", "train": False, "n": 1}],
                                   [{"role": "user", "content": "Hi", "other": None}], [{"role": "user", "content": "", "thinking": "so"}]])
def test_plain_turns_are_rendered_as_the_tokenizer_does(kind, turns):
    tokenizer = tiny_tokenizer(kind)
    chat.prepare(tokenizer)
    tokenizer.chat_template += "{{ messages[0].reasoning_content }}{{ messages[0].n }}{{ messages[0].other is defined }}{{ tools is none }}"
    for asked in (True, False):
        wanted = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked)
        assert chat._render(turns, tokenizer, asked) == wanted
