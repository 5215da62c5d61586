"""benchmarks/generation_speed.py: both ways answer the same prompts, and what they write is compared."""

import importlib.util
import json

from conftest import DIALOGUES, ROOT

spec = importlib.util.spec_from_file_location("generation_speed", ROOT / "benchmarks" / "generation_speed.py")
generation_speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generation_speed)


def measure(monkeypatch, capsys, *flags):
    monkeypatch.setattr("sys.argv", ["generation_speed.py", *map(str, flags)])
    generation_speed.main()
    return capsys.readouterr().out.splitlines()


def test_both_ways_write_the_same(tiny, write_jsonl, tmp_path, monkeypatch, capsys):
    flags = ("--model", tiny("llama"), "--data", write_jsonl(DIALOGUES), "--rows", 3, "--max_new_tokens", 8, "--rounds", 2)
    lines = measure(monkeypatch, capsys, *flags, "--json", tmp_path / "figures.json")
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["prompts"] == result["same"] == 5 and 5 <= result["tokens"] <= 40
    assert lines[0] == f"5 replies, {result['tokens']} tokens, 5 the same"
    assert [len(result[way]) for way in ("one by one", "in batches")] == [2, 2] and lines[2].startswith("in batches")


def test_other_replies_are_counted_as_such(tiny, write_jsonl, monkeypatch, capsys):
    replies = generation_speed.one_by_one
    monkeypatch.setattr(generation_speed, "one_by_one", lambda *args: (["something else", *replies(*args)[0][1:]], 40))
    lines = measure(monkeypatch, capsys, "--model", tiny("llama"), "--data", write_jsonl(DIALOGUES), "--rows", 3, "--max_new_tokens", 8)
    assert lines[0] == "5 replies, 40 tokens, 4 the same"
