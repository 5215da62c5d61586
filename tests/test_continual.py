"""Going on from a finished run, replay with forgetting measured, and several runs that answer together."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import DIALOGUES
from test_classify import ROWS
from test_cli import call
from test_generation import make_prompts
from test_methods import VARIANTS, logits, run_recipe

from recipes.common import generation, losses, models
from recipes.common.errors import UserError

SHORT = ("--max_steps", "2", "--learning_rate", "0.01", "--load_best_model_at_end", "False", "--eval_strategy", "no",
         "--save_strategy", "no")


def read(run):
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data folders of the chat task: first and second."""
    out = {}
    for name, rows in (("first", DIALOGUES[:2]), ("second", DIALOGUES[2:])):
        out[name] = tmp_path_factory.mktemp("data") / name
        out[name].mkdir()
        for split in ("train", "dev", "test"):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out[name] / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def parent(tiny, data, tmp_path_factory):
    made = {}

    def make(variant):
        if variant not in made:
            recipe, *flags = VARIANTS[variant]
            folder = tmp_path_factory.mktemp("parents") / variant
            made[variant] = folder, run_recipe(recipe, tiny("llama"), data["first"], folder, *flags, *SHORT)
        return made[variant]

    return make


def go_on(recipe, start, data, out, *flags):
    """A run with --start_from, which excludes --model: the recipe's main() without run_recipe's own."""
    import importlib
    import sys

    from recipes.common import runs

    seen, finish = [], runs.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "finish", lambda trainer, *rest: (seen.append(trainer), finish(trainer, *rest)))
        patch.setattr(sys, "argv", [f"recipes/{recipe}.py", "--start_from", str(start), "--data", str(data), "--output_dir", str(out),
                                    "--use_cpu", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True", *flags])
        importlib.import_module(f"recipes.{recipe}").main()
    return seen[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_where_the_other_ended(variant, parent, data, tmp_path):
    """With a learning rate of zero the new run is the old one, whatever the method; with another it moves on from there."""
    folder, trainer = parent(variant)
    recipe, *flags = VARIANTS[variant]
    stand_still = ("--max_steps", "1", "--learning_rate", "0", "--load_best_model_at_end", "False", "--max_length", "160")
    same = go_on(recipe, folder, data["second"], tmp_path / "same", *flags, *stand_still)
    torch.testing.assert_close(logits(same.model.eval()), logits(trainer.model.eval()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(models.load_run(tmp_path / "same")), logits(trainer.model), rtol=1e-4, atol=1e-4)
    moved = go_on(recipe, folder, data["second"], tmp_path / "moved", *flags, *SHORT, "--max_length", "160")
    assert not torch.allclose(logits(moved.model.eval()), logits(trainer.model), atol=1e-3)
    [ancestor] = read(tmp_path / "moved")["lineage"]
    assert ancestor["run"] == str(folder) and ancestor["steps"] == 2
    assert ancestor["train_data"] == read(folder)["data"]["splits"]["train"]["sha256"]
    assert ancestor["train_data"] != read(tmp_path / "moved")["data"]["splits"]["train"]["sha256"]


def test_lineage_grows_and_a_new_method_may_build_on_a_whole_model(parent, data, tmp_path):
    folder, _ = parent("full")
    go_on("full", folder, data["second"], tmp_path / "two", *SHORT)
    go_on("lora", tmp_path / "two", data["first"], tmp_path / "three", *SHORT)
    assert [step["run"] for step in read(tmp_path / "three")["lineage"]] == [str(folder), str(tmp_path / "two")]
    loaded = models.load_run(tmp_path / "three")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "two")
    shutil.move(tmp_path / "two", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no such folder"):
        models.load_run(tmp_path / "three")


@pytest.mark.parametrize(("recipe", "flags", "wrong"), [
    ("adapter", (), "use the same recipe"), ("full", (), "go on with the recipe that made it"),
    ("lora", ("--rank", "4"), "its r is 8, this one's 4"), ("lora", ("--alpha", "3"), "its lora_alpha is 16, this one's 3"),
    ("lora", ("--model", "smollm2"), "leave --model out"), ("lora", ("--task", "classify", "--label", "intent"), "no turn has the key")])
def test_what_does_not_go_on_is_refused(recipe, flags, wrong, parent, data, tmp_path):
    folder, _ = parent("lora")
    with pytest.raises(UserError, match=wrong):
        go_on(recipe, folder, data["second"], tmp_path / "run", *flags, *SHORT)
    assert not (tmp_path / "run").exists()


def test_labels_are_those_of_the_run_that_is_continued(tiny, tmp_path, write_jsonl):
    first = write_jsonl(ROWS, "first.jsonl")
    run_recipe("full", tiny("bert"), first, tmp_path / "first", "--task", "classify", *SHORT)
    fewer = write_jsonl([row for row in ROWS if row["label"] != "lost_card"] * 2, "fewer.jsonl")
    go_on("full", tmp_path / "first", fewer, tmp_path / "two", "--task", "classify", *SHORT)
    assert list(read(tmp_path / "two")["data"]["labels"]) == list(read(tmp_path / "first")["data"]["labels"])
    more = write_jsonl([*ROWS, *({"text": "Will it rain?", "label": "weather"} for _ in range(3))], "more.jsonl")
    with pytest.raises(UserError, match="its labels do not include 'weather'"):
        go_on("full", tmp_path / "first", more, tmp_path / "three", "--task", "classify", *SHORT)


# Replay


def test_replay_mixes_a_share_in_and_measures_forgetting(tiny, data, tmp_path, write_jsonl, capsys):
    old = write_jsonl(DIALOGUES * 5, "old.jsonl")
    new = write_jsonl(DIALOGUES[:2] * 8, "new.jsonl")
    run_recipe("full", tiny("llama"), new, tmp_path / "run", "--replay", f"{old}:0.25", *SHORT, "--early_stopping_patience", "0")
    record = read(tmp_path / "run")
    train = record["data"]["splits"]["train"]
    assert train["rows"] == 19  # 14 new rows are left after two went to dev; a quarter of 19 is old
    assert any("replay: 5 of 18 rows" in note for note in train["notes"])
    assert record["forgetting"]["before"].keys() == record["forgetting"]["after"].keys() >= {"loss", "perplexity"}
    assert record["forgetting"]["before"]["loss"] != record["forgetting"]["after"]["loss"]
    assert "old rows, before -> after: loss" in capsys.readouterr().out


def test_forgetting_can_be_measured_without_replay(tiny, data, tmp_path):
    run_recipe("lora", tiny("gpt2"), data["first"], tmp_path / "run", "--measure_forgetting", str(data["second"]), *SHORT)
    record = read(tmp_path / "run")
    assert "forgetting" in record and record["data"]["splits"]["train"]["rows"] == 2 and record["data"]["splits"]["old"]["rows"] == 2


@pytest.mark.parametrize("words", [("--replay", "x.jsonl"), ("--replay", "x.jsonl:1.5")])
def test_replay_needs_a_share(words, tiny, data, tmp_path):
    with pytest.raises(UserError, match="between 0 and 1"):
        run_recipe("full", tiny("gpt2"), data["first"], tmp_path / "run", *words, *SHORT)


# Ensembles


def test_the_mean_of_probabilities():
    def part(values, targets):
        return losses.Part(torch.tensor(values), torch.tensor(targets), torch.ones(1, 1, dtype=torch.bool))

    [mean] = losses.average([[part([[2.0, 0.0, 1.0]], [1])], [part([[0.0, 3.0, 1.0]], [1])]])
    expected = (torch.tensor([2.0, 0.0, 1.0]).softmax(0) + torch.tensor([0.0, 3.0, 1.0]).softmax(0)) / 2
    torch.testing.assert_close(mean.logits.softmax(-1)[0], expected)
    [mean] = losses.average([[part([[2.0]], [[1.0]])], [part([[-1.0]], [[1.0]])]])
    torch.testing.assert_close(mean.logits.sigmoid()[0, 0], (torch.tensor(2.0).sigmoid() + torch.tensor(-1.0).sigmoid()) / 2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["base", "lora", "prefix"])
def test_a_model_and_itself_write_what_it_writes_alone(kind, method):
    from test_generation import make

    model, tokenizer = make(kind, method)
    prompts = make_prompts(tokenizer)
    alone = generation.replies(model, tokenizer, prompts, 10)
    assert generation.replies(losses.Ensemble([model, model]), tokenizer, prompts, 10, batch_size=3) == alone
    assert len(set(alone[0])) > 1


def test_two_models_write_by_the_mean_of_their_probabilities():
    from test_generation import make

    (one, tokenizer), (other, _) = make("llama", "lora"), make("llama", "prefix")
    prompt = make_prompts(tokenizer)[0]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            step = torch.tensor([ids])
            both = [model(input_ids=step, attention_mask=torch.ones_like(step)).logits[0, -1].softmax(-1) for model in (one, other)]
            ids.append(int((both[0] + both[1]).argmax()))
    expected = tokenizer.decode(ids[len(prompt):], skip_special_tokens=True).strip()
    texts, _ = generation.replies(losses.Ensemble([one, other]), tokenizer, [prompt], 6)
    assert texts == [expected]


def test_evaluate_takes_several_runs(parent, data, tmp_path):
    one, other = shutil.copytree(parent("lora")[0], tmp_path / "one"), shutil.copytree(parent("prefix")[0], tmp_path / "other")
    result = call("scripts/evaluate.py", "--run", one, "--run", other, "--max_new_tokens", "4", "--dtype", "float32")
    assert result.code == 0, result.err
    [(label, scores)] = read(one)["evaluation"].items()
    assert label == "test+other" and {row["model"] for row in scores["table"]} == {"lora", "other", "ensemble"}
    loss = {row["model"]: row["values"][0] for row in scores["table"] if row["language"] == "all"}
    assert loss["ensemble"] <= np.mean([loss["lora"], loss["other"]]) + 1e-6  # the logarithm is concave
    assert "evaluation" not in read(other)


def test_runs_that_can_not_answer_together(parent, tiny, data, tmp_path, write_jsonl):
    one = parent("lora")[0]
    run_recipe("full", tiny("gpt2"), data["first"], tmp_path / "gpt2", *SHORT)
    run_recipe("full", tiny("bert"), write_jsonl(ROWS), tmp_path / "labels", "--task", "classify", *SHORT)
    for other, wrong in ((one, "named twice"), (tmp_path / "gpt2", "different tokens"), (tmp_path / "labels", "can't answer together")):
        result = call("scripts/evaluate.py", "--run", one, "--run", other)
        assert result.code == 1 and wrong in result.err and "Traceback" not in result.err
