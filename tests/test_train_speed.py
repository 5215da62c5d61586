"""benchmarks/train_speed.py: every contender that needs no package of its own trains, on the same rows, from the same loss."""

import importlib.util
from types import SimpleNamespace

import pytest
from conftest import DIALOGUES, ROOT

spec = importlib.util.spec_from_file_location("train_speed", ROOT / "benchmarks" / "train_speed.py")
train_speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_speed)


def run(name, model, data, task="chat"):
    return train_speed.run(SimpleNamespace(one=name, model=str(model), data=str(data), task=task, rows=16))


def test_all_contenders_start_from_the_same_loss(tiny, write_jsonl):
    data, results = write_jsonl(DIALOGUES * 4), {}
    for name in train_speed.CONTENDERS:
        if name.startswith(("ours", "trainer")) and name != "ours prefix":  # a prefix is not the identity
            results[name] = run(name, tiny("llama"), data)
    first = results["ours fp32"]["losses"][0]
    for name, result in results.items():
        assert len(result["losses"]) == 2 and result["losses"][0] == pytest.approx(first, rel=2e-3), name
        assert result["supervised"] == results["ours"]["supervised"] > 0
        assert min(result["seconds_per_step"], result["cpu_seconds_per_step"], result["tokens_per_second"], result["peak_gb"]) > 0


def test_short_rows(tiny, write_jsonl, capsys):
    data = write_jsonl([{"source": f"name[{i}]", "target": f"It is called {i}."} for i in range(16)])
    results = {name: [run(name, tiny("llama"), data, "translate")] for name in ("ours prefix", "trainer 8x1")}
    train_speed.show(results)
    shown = capsys.readouterr().out.splitlines()[-3:]
    assert shown[0].split()[:2] == ["s/step", "CPU"] and [line[:11] for line in shown[1:]] == ["ours prefix", "trainer 8x1"]
    assert shown[1].split()[5] == "1.00"
