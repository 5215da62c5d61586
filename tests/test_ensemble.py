"""Several runs that answer together: the mean of their probabilities, token by token, and what can't be averaged."""

import ast
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_classify import ROWS
from test_cli import call
from test_continual import SHORT, data, parent, read  # noqa: F401  data and parent are fixtures
from test_generation import make, make_prompts
from test_methods import run_recipe
from test_translate import ROWS as PAIRS
from test_translate import task_for

from recipes.common import evaluation, generation, losses


def part(values, targets):
    return losses.Part(torch.tensor(values), torch.tensor(targets), torch.ones(1, 1, dtype=torch.bool))


def test_the_mean_of_probabilities():
    [mean] = losses.average([[part([[2.0, 0.0, 1.0]], [1])], [part([[0.0, 3.0, 1.0]], [1])]])
    expected = (torch.tensor([2.0, 0.0, 1.0]).softmax(0) + torch.tensor([0.0, 3.0, 1.0]).softmax(0)) / 2
    torch.testing.assert_close(mean.logits.softmax(-1)[0], expected)
    [mean] = losses.average([[part([[2.0]], [[1.0]])], [part([[-1.0]], [[1.0]])]])
    torch.testing.assert_close(mean.logits.sigmoid()[0, 0], (torch.tensor(2.0).sigmoid() + torch.tensor(-1.0).sigmoid()) / 2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["base", "lora", "prefix"])
def test_a_model_and_itself_write_what_it_writes_alone(kind, method):
    model, tokenizer = make(kind, method)
    prompts = make_prompts(tokenizer)
    alone = generation.replies(model, tokenizer, prompts, 10)
    assert generation.replies(losses.Ensemble([model, model]), tokenizer, prompts, 10, batch_size=3) == alone
    assert len(set(alone[0])) > 1


def test_two_models_write_by_the_mean_of_their_probabilities():
    (one, tokenizer), (other, _) = make("llama", "lora"), make("llama", "prefix")
    prompt = make_prompts(tokenizer)[0]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            step = torch.tensor([ids])
            both = [model(input_ids=step, attention_mask=torch.ones_like(step)).logits[0, -1].softmax(-1) for model in (one, other)]
            ids.append(int((both[0] + both[1]).argmax()))
    expected, _ = generation.text(ids[len(prompt):], one, tokenizer)
    texts, _ = generation.replies(losses.Ensemble([one, other]), tokenizer, [prompt], 6)
    assert texts == [expected]


def readers(tiny, count):
    """Encoder-decoders of different opinions."""
    task, models = task_for(tiny("t5")), []
    for seed in range(count):
        torch.manual_seed(seed)
        model = task.load_model().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.generation_config = task.generation
        models.append(model)
    return task, models


def write(model, task, rows):
    sources = [task.tokenizer(row["source"])["input_ids"] for row in rows]
    return generation.write(model, task.tokenizer, sources, generation.right_pad, 8, 3, 1, "Targets")


def test_encoder_decoders_write_together(tiny):
    task, (one, other) = readers(tiny, 2)
    alone = write(one, task, PAIRS)
    assert write(losses.Ensemble([one, one]), task, PAIRS) == alone != write(other, task, PAIRS)
    expected = []
    for row in PAIRS:
        source, ids = torch.tensor([task.tokenizer(row["source"])["input_ids"]]), [0]
        with torch.no_grad():
            while len(ids) < 9 and ids[-1] != task.tokenizer.eos_token_id:
                both = [model(input_ids=source, decoder_input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1) for model in (one, other)]
                ids.append(int((both[0] + both[1]).argmax()))
        expected.append(generation.text(ids[1:], one, task.tokenizer)[0])
    texts, _ = write(losses.Ensemble([one, other]), task, PAIRS)
    assert texts == expected and texts != alone[0]


def test_what_the_first_encoder_decoder_may_not_write_stays_forbidden(tiny):
    task, (one, other) = readers(tiny, 2)
    ids, mask = generation.right_pad([task.tokenizer(row["source"])["input_ids"] for row in PAIRS], task.tokenizer.pad_token_id)
    join = generation._Join([other], ids, mask)
    scores = torch.randn(len(PAIRS), one.config.vocab_size)
    favourite = int(join(torch.zeros(len(PAIRS), 1, dtype=torch.long), scores)[0].argmax())
    scores[:, favourite] = -torch.inf
    join = generation._Join([other], ids, mask)
    assert (join(torch.zeros(len(PAIRS), 1, dtype=torch.long), scores)[:, favourite] == -torch.inf).all()


def test_evaluate_takes_several_runs(parent, data, tmp_path):  # noqa: F811
    one, other = shutil.copytree(parent("lora")[0], tmp_path / "one"), shutil.copytree(parent("prefix")[0], tmp_path / "lora")
    result = call("scripts/evaluate.py", "--run", one, "--run", other, "--max_new_tokens", "4", "--dtype", "float32")
    assert result.code == 0, result.err
    [(label, scores)] = read(one)["evaluation"].items()
    assert label == "test+lora" and {row["model"] for row in scores["table"]} == {"one", "lora", "ensemble"}
    loss = {row["model"]: row["values"][0] for row in scores["table"] if row["language"] == "all"}
    assert loss["ensemble"] <= np.mean([loss["one"], loss["lora"]]) + 1e-6  # the logarithm is concave
    assert loss["one"] != loss["lora"]  # although the recipe of the one is the folder of the other
    assert "evaluation" not in read(other)


def test_folders_of_the_same_name_are_told_apart_by_their_paths(parent, data, tmp_path):  # noqa: F811
    folders = [shutil.copytree(parent(variant)[0], tmp_path / place / "run") for variant, place in (("lora", "a"), ("full", "b"))]
    words = [word for folder in folders for word in ("--run", folder)]
    result = call("scripts/evaluate.py", *words, "--max_new_tokens", "4", "--dtype", "float32", "--limit", "1")
    assert result.code == 0, result.err
    [(label, scores)] = read(folders[0])["evaluation"].items()
    assert {row["model"] for row in scores["table"]} == {*map(str, folders), "ensemble"}
    assert (folders[0] / f"predictions-{label}.jsonl").is_file() and label.endswith("b-run")


def test_labels_by_the_mean_of_probabilities(tiny, tmp_path, write_jsonl):
    file, folders = write_jsonl(ROWS * 3), [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        run_recipe("full", tiny("bert"), file, folder, "--task", "classify", "--seed", str(seed), *SHORT)
    result = call("scripts/evaluate.py", "--run", folders[0], "--run", folders[1], "--data", file, "--dtype", "float32")
    assert result.code == 0, result.err
    [scores] = read(folders[0])["evaluation"].values()
    loss = {row["model"]: row["values"][0] for row in scores["table"] if row["language"] == "all"}
    assert loss["ensemble"] <= np.mean([loss["one"], loss["two"]]) + 1e-6 and loss["one"] != loss["two"]
    changed = read(folders[1])
    changed["shared_arguments"]["context_turns"] = 2
    (folders[1] / "run.json").write_text(json.dumps(changed), encoding="utf-8")
    result = call("scripts/evaluate.py", "--run", folders[0], "--run", folders[1])
    assert result.code == 1 and "different --context_turns" in result.err


def test_a_run_named_like_a_column_leaves_the_right_answers(tiny, tmp_path, write_jsonl):
    """Its answers would stand in their place, and count as right in every interval."""
    file, folders = write_jsonl(ROWS * 3), [tmp_path / "one", tmp_path / "label"]
    run_recipe("full", tiny("bert"), file, folders[0], "--task", "classify", *SHORT)
    shutil.copytree(folders[0], folders[1])
    result = call("scripts/evaluate.py", "--run", folders[0], "--run", folders[1], "--data", file, "--dtype", "float32")
    assert result.code == 0, result.err
    [(label, scores)] = read(folders[0])["evaluation"].items()
    lines = [json.loads(line) for line in (folders[0] / f"predictions-{label}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in ROWS * 3] != [line["label-run"] for line in lines]
    assert scores["intervals"]["one"] == scores["intervals"]["label-run"] and scores["intervals"]["one"]["accuracy"]["value"] < 100


def test_no_name_of_a_model_is_that_of_a_column():
    script = runpy.run_path(str(ROOT / "scripts/evaluate.py"))
    columns, names = evaluation.COLUMNS, script["member_names"]
    assert [evaluation.beside_columns(recipe) for recipe in ("label", "lora")] == ["label-run", "lora"]
    assert names([Path("/a/tags"), Path("/a/one")]) == ["tags-run", "one"]
    assert names([Path("/a/tags"), Path("/a/tags-run")]) == ["/a/tags", "/a/tags-run"]
    written = {key.value for path in (ROOT / "recipes/common/tasks").glob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))
               if isinstance(node, ast.Dict) for key in node.keys if isinstance(key, ast.Constant)
               and any(isinstance(other, ast.Constant) and other.value == "row" for other in node.keys)}
    assert {"id", "label", "tags", "references"} < written <= columns


def test_runs_that_can_not_answer_together(parent, data, tiny, tmp_path, write_jsonl):  # noqa: F811
    one = parent("lora")[0]
    run_recipe("full", tiny("gpt2"), data["first"], tmp_path / "gpt2", *SHORT)
    run_recipe("full", tiny("bert"), write_jsonl(ROWS), tmp_path / "labels", "--task", "classify", *SHORT)
    for other, wrong in ((one, "named twice"), (tmp_path / "gpt2", "different tokens"), (tmp_path / "labels", "can't answer together")):
        result = call("scripts/evaluate.py", "--run", one, "--run", other)
        assert result.code == 1 and wrong in result.err and "Traceback" not in result.err
    result = call("scripts/evaluate.py", "--run", one, "--run", tmp_path / "gpt2", "--num_beams", "2")
    assert result.code == 1 and "several runs write together greedily" in result.err
