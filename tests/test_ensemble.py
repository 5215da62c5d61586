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

from recipes.common import evaluation, generation, losses, models, scoring, tasks
from recipes.common.errors import UserError
from recipes.common.tasks import classify


def part(values, targets):
    return losses.Part(torch.tensor(values), torch.tensor(targets), torch.ones(1, 1, dtype=torch.bool))


def test_the_mean_of_probabilities():
    [mean] = losses.average([[part([[2.0, 0.0, 1.0]], [1])], [part([[0.0, 3.0, 1.0]], [1])]])
    expected = (torch.tensor([2.0, 0.0, 1.0]).softmax(0) + torch.tensor([0.0, 3.0, 1.0]).softmax(0)) / 2
    torch.testing.assert_close(mean.logits.softmax(-1)[0], expected)
    [mean] = losses.average([[part([[2.0]], [[1.0]])], [part([[-1.0]], [[1.0]])]])
    torch.testing.assert_close(mean.logits.sigmoid()[0, 0], (torch.tensor(2.0).sigmoid() + torch.tensor(-1.0).sigmoid()) / 2)


def test_what_only_some_have_read_is_decided_by_those():
    """A row whose two last answers all know, and one that the second model knows nothing of."""
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 7), torch.tensor([1, 2, 3, 4, 5])
    long = losses.Part(logits, targets, torch.tensor([[True, False, True, True], [True, True, False, False]]))
    short = losses.Part(torch.randn(2, 7), targets[1:3], torch.tensor([[True, True], [False, False]]))
    [mean] = losses.average([[long], [short]], from_end=True)
    assert mean.where.sum(1).tolist() == [3, 2] and torch.equal(mean.targets, targets)
    expected = long.log_probabilities().exp()
    expected[1:3] = (expected[1:3] + short.log_probabilities().exp()) / 2
    torch.testing.assert_close(mean.log_probabilities().exp(), expected)
    first = losses.Part(short.logits, targets[:2], short.where)
    [mean] = losses.average([[first], [long]])
    expected = (long.log_probabilities()[:2].exp() + first.log_probabilities().exp()) / 2
    torch.testing.assert_close(mean.log_probabilities().exp()[:2], expected)
    with pytest.raises(UserError, match="different tokens of the same row"):
        losses.average([[long], [short]])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["base", "lora", "prefix"])
def test_a_model_and_itself_write_what_it_writes_alone(kind, method):
    model, tokenizer = make(kind, method)
    prompts = make_prompts(tokenizer)
    alone = generation.replies(model, tokenizer, prompts, 10)
    twice = generation.side_by_side([prompts, prompts])
    assert generation.replies(losses.Ensemble([model, model]), tokenizer, twice, 10, batch_size=3) == alone
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
    texts, _ = generation.replies(losses.Ensemble([one, other]), tokenizer, [(prompt, prompt)], 6)
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
    sources = generation.side_by_side([[task.tokenizer(row["source"])["input_ids"] for row in rows]] * len(losses.members(model)))
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
    join = generation._Join([other], [(ids, mask)])
    scores = torch.randn(len(PAIRS), one.config.vocab_size)
    favourite = int(join(torch.zeros(len(PAIRS), 1, dtype=torch.long), scores)[0].argmax())
    scores[:, favourite] = -torch.inf
    join = generation._Join([other], [(ids, mask)])
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
    folders = [shutil.copytree(parent(variant)[0], tmp_path / place / "run") for variant, place in (("lora", "a"), ("full", 200 * "b"))]
    words = [word for folder in folders for word in ("--run", folder)]
    result = call("scripts/evaluate.py", *words, "--max_new_tokens", "4", "--dtype", "float32", "--limit", "1")
    assert result.code == 0, result.err
    [(label, scores)] = read(folders[0])["evaluation"].items()
    assert {row["model"] for row in scores["table"]} == {*map(str, folders), "ensemble"}
    assert (folders[0] / f"predictions-{label}.jsonl").is_file() and label.startswith("test+")


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


def evaluated(*folders, **flags):
    """(the scores, the losses and the answers of `folders` together, the notes)"""
    words = [str(word) for folder in folders for word in ("--run", folder)]
    words += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    result = call("scripts/evaluate.py", *words, "--dtype", "float32")
    assert result.code == 0, result.err
    [*_, (label, scores)] = read(folders[0])["evaluation"].items()
    lines = [json.loads(line) for line in (folders[0] / f"predictions-{label}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return scores, json.loads((folders[0] / f"losses-{label}.json").read_text(encoding="utf-8")), lines


@pytest.fixture
def unequal(tiny, tmp_path, write_jsonl):
    """Two runs of a task that hold rows of other lengths: made("classify", recipes, train rows, dev rows, test rows, flags)."""
    def make(recipes, kinds, splits, *flags, lengths=(12, 64)):
        folder = tmp_path / "data"
        for name, rows in splits.items():
            write_jsonl(rows, f"data/{name}.jsonl")
        out = [tmp_path / name for name in ("one", "two")]
        for recipe, kind, run, length in zip(recipes, kinds, out, lengths, strict=True):
            run_recipe(recipe, tiny(kind), folder, run, "--max_length", str(length), "--seed", str(length), *flags, *SHORT)
        return out
    return make


OUTSIDE = [{"text": "Sing a song", "label": "oos"}, {"text": "写首诗" * 9, "label": "oos"}]
LONG = [{"text": f"{row['text']} " * 6, "label": row["label"]} for row in ROWS]


def mean_of(logits):
    return np.log(np.mean([np.exp(own - own.max(1, keepdims=True)) / np.exp(own - own.max(1, keepdims=True)).sum(1, keepdims=True)
                           for own in logits], 0))


def alone(run, rows):
    """The logits of a run on rows, read as it was trained to."""
    task = tasks.of_run(read(run), models.load_run_tokenizer(run))
    features, _ = task.encode(rows, "rows", outside_alone=True)
    model = models.load_run(run, torch.float32, task.auto_class, task.config, merge=True)
    return np.array([own for _, own in scoring.dataset_outputs(model, task, features, "x")]), np.array(features["labels"])


@pytest.mark.parametrize("kinds", [("bert", "bert"), ("bert", "gpt2")])
def test_each_member_reads_as_much_as_it_did_and_the_threshold_is_that_of_the_mean(unequal, kinds):
    runs = unequal(("full", "lora"), kinds, {"train": LONG, "dev": [*ROWS, *LONG, *OUTSIDE], "test": [*LONG, *OUTSIDE]},
                   "--task", "classify", "--oos_label", "oos", "--head_start", "random")  # else all are sure, and rounding decides
    apart = [evaluated(run) for run in runs]
    scores, sums, lines = evaluated(*runs)
    for name, (own, nll, answers) in zip(("one", "two"), apart, strict=True):
        recipe = read(runs[name == "two"])["recipe"]
        for row, pair in nll[recipe].items():
            np.testing.assert_allclose(sums[name][row], pair, rtol=1e-4, atol=1e-6)
        assert [line[name] for line in lines] == [line[recipe] for line in answers]
        np.testing.assert_allclose([row["values"] for row in scores["table"] if row["model"] == name],
                                   [row["values"] for row in own["table"]], rtol=1e-4)
    [on_test, labels], [on_dev, dev_labels] = ([mean_of([alone(run, rows)[0] for run in runs]), alone(runs[0], rows)[1]]
                                               for rows in ([*LONG, *OUTSIDE], [*ROWS, *LONG, *OUTSIDE]))
    cut = classify.threshold(on_dev, dev_labels)
    names = list(read(runs[0])["data"]["labels"])
    sure = np.exp(on_test).max(1)
    clear = abs(sure - cut) > 1e-5  # rounding decides the others
    expected = np.where(sure < cut, "oos", np.array(names)[on_test.argmax(1)])
    assert (np.array([line["ensemble"] for line in lines]) == expected)[clear].all() and clear.any()
    thresholds = [read(run)["metrics"]["dev_oos_threshold"] for run in runs]
    assert all(f"less than {classify._exact(own)} probability" in " ".join(scores["notes"]) for own in [*thresholds, cut])
    (runs[0].parent / "data/dev.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    scores, _, _ = evaluated(*runs)
    told = " ".join(scores["notes"])
    assert f"less than {classify._exact(np.mean(thresholds))} probability" in told and "they have changed since the training" in told


def test_dialogues_are_cut_for_each_member_as_it_was_trained(unequal, data):  # noqa: F811
    rows = [json.loads(line) for name in ("first", "second") for line in (data[name] / "train.jsonl").read_text("utf-8").splitlines()]
    runs = unequal(("lora", "full"), ("llama", "llama"), {name: rows for name in ("train", "dev", "test")}, lengths=(40, 160))
    apart = [evaluated(run, max_new_tokens=4) for run in runs]
    scores, sums, lines = evaluated(*runs, max_new_tokens=4)
    counts = []
    for name, run, (_, nll, answers) in zip(("one", "two"), runs, apart, strict=True):
        recipe = read(run)["recipe"]
        assert sums[name].keys() == nll[recipe].keys()
        for row, pair in nll[recipe].items():
            np.testing.assert_allclose(sums[name][row], pair, rtol=1e-4)
        assert [line[name] for line in lines] == [line[recipe] for line in answers]
        counts.append(int(sum(items for _, items in nll[recipe].values())))
    assert counts[0] < counts[1] == sum(items for _, items in sums["ensemble"].values())
    told = f"so they can't be compared: one {counts[0]}, two {counts[1]}, ensemble {counts[1]}"
    assert any(told in note for note in scores["notes"])
    for row, (nll, items) in sums["ensemble"].items():  # rows that both read whole: no more than the mean, as the logarithm is concave
        if row in sums["one"] and sums["one"][row][1] == items:
            assert nll <= (sums["one"][row][0] + sums["two"][row][0]) / 2 + 1e-4


def test_words_that_one_member_has_not_read_are_tagged_by_the_other(unequal):
    rows = [{"tokens": "Where is my order please ? It was sent to Bonn on Friday".split(), "tags": ["O"] * 10 + ["B-city", "O", "B-day"]},
            {"tokens": ["我", "想", "退", "货"], "tags": ["O", "O", "B-act", "I-act"]}]
    runs = unequal(("full", "full"), ("bert", "bert"), {name: rows for name in ("train", "dev", "test")}, "--task", "tag")
    _, sums, _ = evaluated(*runs)
    assert sums["one"]["0"][1] < sums["two"]["0"][1] == sums["ensemble"]["0"][1] == 13
    assert any("one: " in note for note in evaluated(*runs)[0]["notes"])


def test_texts_that_are_cut_into_other_blocks_are_refused(unequal):
    rows = [{"text": "Are you open? Yes, until nine. " * 3}]
    runs = unequal(("full", "full"), ("gpt2", "gpt2"), {name: rows for name in ("train", "dev", "test")}, "--task", "pretrain")
    result = call("scripts/evaluate.py", "--run", runs[0], "--run", runs[1])
    assert result.code == 1 and "cut texts at different --max_length (64, 12)" in result.err and "Traceback" not in result.err


def test_pretrained_models_write_together(unequal):
    rows = [{"text": "Are you open? Yes, until nine. " * 3}]
    runs = unequal(("full", "lora"), ("gpt2", "gpt2"), {name: rows for name in ("train", "dev", "test")}, "--task", "pretrain",
                   lengths=(32, 32))
    scores, sums, _ = evaluated(*runs, max_new_tokens=4)
    assert sums["ensemble"].keys() == sums["one"].keys() and "ensemble" in dict(scores["samples"][0])


def test_rows_held_back_by_one_run_alone_are_said(unequal):
    runs = unequal(("full", "full"), ("bert", "bert"), {"train": ROWS * 4}, "--task", "classify", lengths=(32, 64))
    scores, _, _ = evaluated(*runs)
    assert any("held other dev rows back" in note and str(runs[1]) in note for note in scores["notes"])


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
    assert names([Path("/a/context"), Path("/a/text_pair")]) == ["context-run", "text_pair-run"]  # of classify, where a row has them
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
