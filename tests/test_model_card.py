"""MODEL_CARD.md: what the Hub reads from it, and that it says what run.json says."""

import json

import pytest
from conftest import DIALOGUES
from huggingface_hub import ModelCard
from test_cli import call
from test_methods import run_recipe

from recipes.common import model_card


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("carded")
    for split in ("train", "dev", "test"):
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in DIALOGUES), encoding="utf-8")
    return out


@pytest.mark.parametrize(("recipe", "library"), [("lora", "peft"), ("full", "transformers")])
def test_the_card_says_what_run_json_says(recipe, library, tiny, folder, tmp_path):
    run = tmp_path / "run"
    run_recipe(recipe, tiny("llama"), folder, run, "--max_steps", "1")
    card = ModelCard.load(run / "MODEL_CARD.md")
    assert card.data.library_name == library and card.data.pipeline_tag == "text-generation"
    assert {result.dataset_split for result in card.data.eval_results} == {"dev"}
    assert (run / "README.md").exists() == (recipe == "lora")  # PEFT's own stays

    assert call("scripts/evaluate.py", "--run", run, "--base", "--max_new_tokens", "4").code == 0
    card, record = ModelCard.load(run / "MODEL_CARD.md"), json.loads((run / "run.json").read_text(encoding="utf-8"))
    tuned = record["evaluation"]["test"]["table"][-1]
    assert tuned["model"] == recipe and tuned["language"] == "all"
    found = {result.metric_name: result.metric_value for result in card.data.eval_results if result.dataset_split == "test"}
    assert found == {name: pytest.approx(value, abs=1e-4)
                     for name, value in zip(record["evaluation"]["test"]["columns"], tuned["values"], strict=True)}
    assert card.data.language == ["en", "zh"] and card.data.datasets == [folder.name] and card.data.license is None
    assert card.data.base_model is None  # a folder of this machine says nothing to others
    for fact in (record["command"], f"{record['trainable_parameters']:,}", record["data"]["splits"]["train"]["sha256"][:12],
                 "| 4 dialogues |"):
        assert fact in card.text
    tables = [line.count("|") - line.count("\\|") for line in card.text.splitlines() if line.startswith("| test")]
    for name, scores in record["evaluation"]["test"]["intervals"].items():
        for heading, one in scores.items():
            value, low = model_card.cell(one["value"]), model_card.cell(one["low"])
            assert f"| {model_card.short(name)} | {heading} | {value} | {low} |" in card.text
    assert record["data"]["doctor"]["sentences"] and all(f"- {one}" in card.text for one in record["data"]["doctor"]["sentences"])
    assert len(tables) == 6 and set(tables) == {5 + 9}


def test_names_and_numbers_of_a_record():
    record = {"recipe": "lora", "task": "chat", "metrics": {"dev_loss": "nan", "dev_perplexity": 3.5},
              "shared_arguments": {"data": ["owner/name:0.3", "data/customer_service:0.7", "/home/me/mine.jsonl"]}}
    assert model_card._datasets(record) == ["owner/name", "customer_service", "mine.jsonl"]
    [result] = model_card._results(record)
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("perplexity", 3.5, "dev")
    assert [model_card.cell(value) for value in ("a|b\nc", 0.123456, 7)] == ["a\\|b c", "0.1235", "7"]
    assert [model_card._is_path(name) for name in ("gpt2", "Qwen/Qwen3-0.6B", "/models/x", "a/b/c")] == [False, False, True, True]
