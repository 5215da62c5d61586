"""benchmarks/train_speed.py: every contender that needs no package of its own trains, on the same rows, from the same loss."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from conftest import DIALOGUES, ROOT, tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

spec = importlib.util.spec_from_file_location("train_speed", ROOT / "benchmarks" / "train_speed.py")
train_speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_speed)


def run(name, model, data, task="chat", length=None, size=None):
    return train_speed.run(SimpleNamespace(one=name, model=str(model), data=str(data), task=task, rows=16, step=[8], lengths=[length],
                                           sizes=[size]))


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(train_speed.product_rate, "__defaults__", (256,))


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
        assert 0 < result["of_peak"] < 1 and result["padding"] < 0.02 or name == "trainer 8x1" and result["padding"] > 0.1, name


def test_short_rows(tiny, write_jsonl, capsys):
    data = write_jsonl([{"source": f"name[{i}]", "target": f"It is called {i}."} for i in range(16)])
    results = {name: [run(name, tiny("llama"), data, "translate")] for name in ("ours prefix", "trainer 8x1")}
    train_speed.show(results)
    shown = capsys.readouterr().out.splitlines()[-3:]
    assert "loss off" in shown[0] and "%" in shown[1]
    assert shown[0].split()[:2] == ["s/step", "CPU"] and [line[:11] for line in shown[1:]] == ["ours prefix", "trainer 8x1"]
    assert shown[1].split()[5] == "1.00"


def test_random_rows_on_a_model_of_a_size(tiny, capsys):
    results = {name: [run(name, tiny("llama"), None, length=24, size="1M")] for name in ("ours", "ours full", "trainer 1x8")}
    for result in (rounds[0] for rounds in results.values()):
        assert result["padding"] == 0 and result["supervised"] == 16 * 12
        assert min(result["product_rates"].values()) > 0
    train_speed.show(results)
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()[-3:]}
    assert [word for word in lines["trainer 1x8"] if word.endswith("%")][-1] == "0.00%"  # its loss is its own
    assert lines.keys() == results.keys()


def test_the_products_a_step_needs():
    """By hand: twice the weights for each token and pass; the vocabulary only where it is trained on."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    block = 2 * (32 * 32 + 32 * 16) + 3 * 32 * 64  # q and o, k and v, three of the feed-forward
    assert train_speed.products_of(model, 100, 40) == 2 * 3 * (2 * block * 100 + 400 * 32 * 40)
    frozen = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert train_speed.products_of(frozen, 100, 40) == 2 * 2 * (2 * block * 100 + 400 * 32 * 40)


def test_sizes_are_what_they_say():
    for name, parameters in (("1M", 1.3e6), ("10M", 9.9e6), ("35M", 35.3e6), ("135M", 134.5e6)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(train_speed.llama(name))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.05)
