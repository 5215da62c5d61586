"""benchmarks/e2e.py: the official scores against published ones, the papers' rows against the papers' tables, and a row from end to end."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHARED
from test_cli import call
from transformers import AutoModelForCausalLM, GPT2Config

from recipes import adapter, full, lora, prefix
from recipes.common import args, generation, item_scores
from recipes.common.errors import UserError

spec = importlib.util.spec_from_file_location("e2e", ROOT / "benchmarks" / "e2e.py")
e2e = importlib.util.module_from_spec(spec)
spec.loader.exec_module(e2e)

RECIPES = {"full": full, "lora": lora, "prefix": prefix, "adapter": adapter}
MEANINGS = ["name[The Vaults], eatType[pub]", "name[Aromi], familyFriendly[yes]", "name[Cocum], priceRange[more than £30]"]
TEXTS = ["The Vaults is a pub.", "Aromi is family friendly.", "Cocum is expensive."]
NEEDS_JAVA = pytest.mark.skipif(e2e.unavailable() is not None, reason=e2e.unavailable() or "")


def shared(name):
    """The rows of a file in ../shared."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path):
    """A small E2E: one description a row of train, two for each meaning of dev and test."""
    out = tmp_path / "e2e"
    out.mkdir()
    for split in ("train", "dev", "test"):
        rows = [{"source": meaning, "target": text, **({} if split == "train" else {"refs": [text, text.replace("is", "was")]})}
                for meaning, text in zip(MEANINGS, TEXTS, strict=True)]
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return out


@pytest.fixture
def no_java(monkeypatch):
    """A machine without Java."""
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *rest, **more: None if name == "java" else found(name, *rest, **more))


# The scores


def systems():
    found = [row for row in shared("golden/e2e/systems.jsonl") if row["refs_file"] == "e2e_nlg/dev.jsonl"]
    return {row["id"]: row for row in found}, [row["refs"] for row in shared("data/e2e_nlg/dev.jsonl")]


def test_bleu_and_nist_are_those_of_the_official_scripts(no_java):
    found, references = systems()
    golden, outputs = found["ukp-model-t"]["computed_with_upstream_python_code"], found["ukp-model-t"]["hyps"]
    scores = e2e.measure(outputs, references)
    assert scores.keys() == {"BLEU", "NIST"}
    assert scores["BLEU"][0] / 100 == pytest.approx(golden["bleu"], abs=1e-6)
    assert scores["NIST"][0] == pytest.approx(golden["nist"], abs=1e-6)
    for value, low, high in scores.values():
        assert low < value < high < 1.1 * value
    late = item_scores.METRICS["bleu"].score(e2e.bleu_counts([outputs[0], *outputs[:-1]], references).sum(0))
    assert late < scores["BLEU"][0] - 5  # each output one item too late


@pytest.mark.slow
@NEEDS_JAVA
def test_rouge_cider_and_meteor_are_those_of_the_official_scripts():
    found, references = systems()
    golden, scores = found["ukp-model-d-seed1"], e2e.measure(found["ukp-model-d-seed1"]["hyps"], references)
    for name, digits in (("BLEU", 100), ("NIST", 1), ("ROUGE-L", 100), ("CIDEr", 1), ("METEOR", 100)):
        key = {"ROUGE-L": "rouge"}.get(name, name.lower())
        assert scores[name][0] / digits == pytest.approx(golden["published_official_scripts"][key], abs=5.1e-5), name
    assert scores["CIDEr"][0] == pytest.approx(golden["computed_with_upstream_python_code"]["cider"], abs=1e-6)
    assert len(scores["METEOR"]) == 1 and len(scores["CIDEr"]) == 3


def nist(outputs, references):
    return float(e2e.nist(e2e.nist_counts(outputs, references).sum(0)))


def test_nist_by_hand():
    three = math.log2(3)  # each word of "a b c" tells so much; what follows a word tells nothing more
    assert nist(["a b c"], [["a b c"]]) == pytest.approx(three)
    assert nist(["A B C"], [["a b c"]]) == pytest.approx(three)
    assert nist(["a b"], [["a b c"]]) == pytest.approx(three / 2)  # two thirds of the length
    assert nist(["x y z"], [["a b c"]]) == nist([""], [["a b c"]]) == 0
    # Two references allow an n-gram together: all four words count, each of four in the references.
    assert nist(["a b c d"], [["a b", "c d"]]) == pytest.approx(2)  # "a b", "c d" are certain once begun
    assert nist(["a a a a"], [["a b", "c d"]]) == pytest.approx(2 / 4)  # each as often as a reference has it


def test_bleu_takes_no_notice_of_capitals(no_java):
    scores = e2e.measure(["THE VAULTS IS A PUB.", "Aromi was  family\nfriendly."], [[TEXTS[0]], [TEXTS[1], "Aromi was family friendly."]])
    assert scores["BLEU"][0] == pytest.approx(100)
    assert e2e.measure(["The Vaults was a pub.", TEXTS[1]], [[TEXTS[0]], [TEXTS[1]]])["BLEU"][0] < 90


@NEEDS_JAVA
def test_coco_scores_of_small_texts(monkeypatch):
    monkeypatch.setattr(e2e, "meteor", lambda outputs, references: float(len(outputs[0][0].split()) == len(references[0][0].split()) == 5))
    scores = e2e.measure(["the vaults is a pub", "", TEXTS[2]], [[text] for text in TEXTS])
    assert scores["ROUGE-L"][0] == pytest.approx(200 / 3)  # two as they should be, one empty
    assert 0 < scores["METEOR"][0] <= 1 and 0 < scores["CIDEr"][0] < 10


def test_outputs_are_scored_and_what_is_missing_is_said(folder, tmp_path, no_java):
    (tmp_path / "out.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    result = call("benchmarks/e2e.py", "score", tmp_path / "out.txt", "--data", folder)
    assert result.code == 0, result.err
    assert re.search(r"^\| out.txt \|  \| 100.00 \(100.00 to 100.00\) \|", result.out, re.M)
    assert re.search("note: METEOR, ROUGE-L and CIDEr are left out: (their programs need Java|pycocoevalcap is not installed)", result.out)
    assert "CIDEr |" not in result.out


@pytest.mark.parametrize(("text", "flags", "wrong"), [
    ("one\ntwo\n", ("--data", "FOLDER"), "out.txt has 2 outputs, a line each, but"),
    ("one\ntwo\nthree\n\n", ("--data", "FOLDER"), "has 4 outputs"),
    ("", ("--data", "FOLDER"), "has 0 outputs"),
    (None, ("--data", "FOLDER"), "out.txt: No such file"),
    ("one\n", (), "--data FOLDER has to say"),
])
def test_outputs_that_can_not_be_scored(text, flags, wrong, folder, tmp_path):
    if text is not None:
        (tmp_path / "out.txt").write_text(text, encoding="utf-8")
    result = call("benchmarks/e2e.py", "score", tmp_path / "out.txt", *(folder if word == "FOLDER" else word for word in flags))
    assert result.code == 1 and wrong in result.err and "Traceback" not in result.err


def test_a_split_that_is_not_there(folder, tmp_path):
    (folder / "test.jsonl").unlink()
    (tmp_path / "out.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    result = call("benchmarks/e2e.py", "score", tmp_path / "out.txt", "--data", folder)
    assert result.code == 1 and "has no test file: it has train, dev" in result.err


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"row": 0, "lora": "a"}\n', '{"references": ["a"]}\n',
                                  '{"references": [], "lora": "a"}\n', '{"references": ["a"], "lora": 1}\n',
                                  '{"references": ["a"], "lora": "a"}\n{"references": ["a"]}\n'])
def test_broken_predictions(text, tmp_path):
    path = tmp_path / "predictions-test.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="holds no predictions of --task translate"):
        e2e.predictions(path)


def test_predictions_hold_their_references(folder, tmp_path):
    path = tmp_path / "predictions-test.jsonl"
    path.write_text('{"references": ["a"], "lora": "a"}\n', encoding="utf-8")
    result = call("benchmarks/e2e.py", "score", path, "--data", folder)
    assert result.code == 1 and "leave --data and --split out" in result.err


# The papers' rows


def parsed(row):
    """What the recipe of a row makes of its flags."""
    return args.parse("", RECIPES[row.recipe].MethodArguments,
                      ["--task", "translate", "--report_to", "none", "--gradient_accumulation_steps", "1", *row.flags.split()])


@pytest.mark.parametrize("name", e2e.ROWS)
def test_what_a_row_trains_on_gpt2_medium(name):
    row = e2e.ROWS[name]
    _, method, training = parsed(row)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
        task = SimpleNamespace(peft_type="CAUSAL_LM", new_modules=lambda: None, window=1024, max_length=256)
        model, _ = RECIPES[row.recipe].adapt(model, task, method, training)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == row.trained


def test_rows_are_those_of_the_papers():
    table = {(row["method"], row["trainable_params"]): row for row in shared("paper_tables/lora_table3_e2e.jsonl")
             if row["model"] == "gpt2-medium"}
    names = {"full": "Full FT", "top2": "FT-Top2", "adapter-small": "Adapter-L", "adapter": "Adapter-L", "prefix": "PreLayer (prefix)",
             "lora": "LoRA"}
    acl = {row["method"]: row for row in shared("paper_tables/prefix_tuning_tables.jsonl")
           if (row["version"], row["model"]) == ("ACL-2021", "gpt2-medium")}
    acl_names = {"full": "FT-FULL", "top2": "FT-TOP2", "adapter-small": "ADAPTER(0.1%)", "adapter": "ADAPTER(3%)", "prefix": "PREFIX(0.1%)"}
    keys = ("bleu", "nist", "meteor", "rouge_l", "cider")
    for name, row in e2e.ROWS.items():
        trained, *figures = row.published[e2e.LORA]
        assert figures == [table[names[name], trained][key] for key in keys], name
        if name in acl_names:
            assert list(row.published[e2e.PREFIX][1:]) == [acl[acl_names[name]][key] for key in keys], name
    assert (e2e.LORA in e2e.ROWS["lora"].published, e2e.PREFIX in e2e.ROWS["lora"].published) == (True, False)


def test_hyper_parameters_are_those_of_the_papers():
    rows = {row["method"]: row for row in shared("paper_tables/prefix_tuning_hparams.jsonl") if row["dataset"] == "E2E"}
    names = {"full": "Fine-tune", "top2": "FT-top2", "adapter-small": "Adapter 0.1%", "adapter": "Adapter 3%", "prefix": "Prefix"}
    rows |= {"LoRA": next(row for row in shared("paper_tables/lora_table11_hparams.jsonl") if row["dataset"] == "E2E")}
    for name, row in e2e.ROWS.items():
        paper, (_, method, training) = rows[names.get(name, "LoRA")], parsed(row)
        assert (training.learning_rate, training.num_train_epochs, training.per_device_train_batch_size) == (
            paper["learning_rate"], paper["epochs"], paper["batch_size"]), name
        assert training.lr_scheduler_type == "linear" and training.warmup_steps == paper.get("warmup_steps", 0)
        if name == "prefix":
            assert method.num_virtual_tokens == paper["prefix_length"]
    assert (method.alpha, method.dropout, training.weight_decay, training.label_smoothing_factor) == (
        paper["lora_alpha"], paper["dropout"], paper["weight_decay"], paper["label_smoothing"])
    assert row.search.startswith(f"--num_beams {paper['beam']} --length_penalty {paper['length_penalty']} "
                                 f"--no_repeat_ngram_size {paper['no_repeat_ngram']} ")


def test_rows_show_the_command_of_each():
    result = call("benchmarks/e2e.py", "rows")
    assert result.code == 0
    for name in e2e.ROWS:
        assert f"python benchmarks/e2e.py train {name} --data" in result.out


# The data


def test_the_papers_form():
    assert e2e.papers_form(MEANINGS[0]) == "name : The Vaults | Type : pub"
    assert e2e.papers_form("name[Cocum], priceRange[more than £30], customer rating[5 out of 5], familyFriendly[no]") == (
        "name : Cocum | price : more than £30 | customer rating : 5 out of 5 | family friendly : no")
    for wrong in ("", "name", "name[Cocum", "name[Cocum] eatType[pub]", "name : Cocum | Type : pub"):
        with pytest.raises(ValueError, match="is no meaning representation"):
            e2e.papers_form(wrong)


def test_data_in_the_papers_form(folder, tmp_path):
    (folder / "dev.jsonl").write_text(2 * (json.dumps({"mr": MEANINGS[0], "refs": TEXTS[:1]}) + "\n"), encoding="utf-8")
    out = tmp_path / "out"
    for _ in range(2):  # the same again is no harm
        result = call("benchmarks/e2e.py", "data", folder, out)
        assert result.code == 0 and "train.jsonl: 3 rows of" in result.out, result.err
    assert {path.name for path in out.iterdir()} == {"train.jsonl", "dev.jsonl", "test.jsonl"}
    dev = [json.loads(line) for line in (out / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    assert dev == 2 * [{"source": "name : The Vaults | Type : pub", "refs": TEXTS[:1]}]
    (out / "dev.jsonl").write_text("mine", encoding="utf-8")
    result = call("benchmarks/e2e.py", "data", folder, out)
    assert result.code == 1 and "holds something else" in result.err and (out / "dev.jsonl").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(("row", "wrong"), [({"source": "a pub", "target": "b"}, "row 1: 'a pub' is no meaning representation"),
                                            ({"mr": "name[a]"}, 'row 1: .*"target"')])
def test_rows_that_are_no_e2e(row, wrong, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=wrong):
        e2e.linearise(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is no folder"):
        e2e.linearise(tmp_path / "nowhere", tmp_path / "out")


# From end to end


@pytest.fixture
def in_this_process(monkeypatch):
    """The scripts run here, which is faster than in processes of their own."""
    process = subprocess.run

    def run(words, **options):
        if not str([*words, ""][1]).startswith(str(ROOT / "scripts")):
            return process(words, **options)
        result = call(str(words[1]), *words[2:])
        print(result.out + result.err)
        return SimpleNamespace(returncode=result.code)

    monkeypatch.setattr(subprocess, "run", run)


def test_a_row_is_trained_and_scored_beside_the_papers(folder, tmp_path, tiny, in_this_process, no_java):
    run = tmp_path / "runs" / "lora"
    given = ("train", "lora", "--data", folder, "--model", tiny("gpt2"), "--output_dir", run)
    result = call("benchmarks/e2e.py", *given, "--max_steps", 1, "--max_length", 128, "--use_cpu", "--report_to", "none", "--limit", 2)
    assert result.code == 0, result.out[-3000:] + result.err
    assert "10 beams, length penalty 0.9, no 4 tokens twice, at most 64 new tokens" in result.out
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    table = [line.split(" | ") for line in result.out.splitlines() if line.startswith("| ")]
    assert table[-2][:2] == ["| lora", f"{record['trainable_parameters']:,}"]
    assert table[-1][:3] == ["| LoRA, table 3, GPT-2 medium", "0.35M", "70.40"]
    assert json.loads((run / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()[1])["source"] == (
        "name : Aromi | family friendly : yes")
    again = call("benchmarks/e2e.py", *given)
    assert again.code == 1 and "holds another run" in again.err
    shown = call("benchmarks/e2e.py", "table", run)
    assert shown.code == 0 and table[-2][0] in shown.out and " to " in shown.out.splitlines()[2].split("|")[-2]  # the loss
    (run / "predictions-dev.jsonl").write_text((run / "predictions-test.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    assert "has several predictions (dev, test): name one with --split" in call("benchmarks/e2e.py", "table", run).err
    assert "has no predictions of other" in call("benchmarks/e2e.py", "table", run, "--split", "other").err


def test_a_training_that_fails_ends_the_row(folder, tmp_path, tiny, in_this_process):
    result = call("benchmarks/e2e.py", "train", "lora", "--data", folder, "--model", tiny("llama"), "--output_dir", tmp_path / "run")
    assert result.code == 1 and "--target_modules c_attn: Target modules" in result.out and "evaluate.py" not in result.out


def write_run(folder, name, lines, trained=7):
    """A run folder with what the table reads; lines: source -> {model: output}."""
    run = folder / name
    run.mkdir()
    record = {"recipe": "lora", "task": "translate", "trainable_parameters": trained, "model": {}, "data": {}, "shared_arguments": {},
              "training_arguments": {}}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (run / "predictions-dev.jsonl").write_text("".join(json.dumps({
        "id": i, "row": i, "language": "en", "source": source, "references": [source], **outputs}) + "\n"
        for i, (source, outputs) in enumerate(lines.items())), encoding="utf-8")
    (run / "losses-dev.json").write_text(json.dumps({"lora": {"0": [6.0, 3], "1": [2.0, 1]}}), encoding="utf-8")
    return run


def test_a_table_of_runs_shows_the_untuned_model_once(tmp_path, no_java):
    good = {text: {"tiny (untuned)": "No idea at all, sorry.", "lora": text} for text in TEXTS[:2]}
    bad = {text: {"tiny (untuned)": "No idea at all, sorry.", "lora": "It is."} for text in TEXTS[:2]}
    runs = write_run(tmp_path, "one", good), write_run(tmp_path, "two", bad, 1234)
    result = call("benchmarks/e2e.py", "table", *runs)
    assert result.code == 0, result.err
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.out.splitlines()[2:] if line.startswith("|")]
    assert [line[:2] for line in lines] == [["tiny (untuned)", "0"], ["one", "7"], ["two", "1,234"]]
    assert lines[1][2] == "100.00 (100.00 to 100.00)" and lines[1][-1] == "2.000 (2.000 to 2.000)" and lines[0][-1] == "–"
    other = write_run(tmp_path, "other", {text: {"lora": text} for text in TEXTS[1:]})
    result = call("benchmarks/e2e.py", "table", runs[0], other)
    assert result.code == 1 and "were scored on different items" in result.err


# The beam search of the papers


def test_no_tokens_twice_but_those_of_the_prompt():
    rule, scores = generation._NoRepeat(2, 4), torch.zeros(1, 10)
    forbidden = rule(torch.tensor([[5, 6, 5, 6, 7, 8, 7]]), scores.clone())
    assert [i for i in range(10) if forbidden[0, i] == -math.inf] == [8]  # 7 8 stands there; 6 5 only in the prompt
    assert rule(torch.tensor([[5, 6, 5, 6]]), scores.clone()).isfinite().all()


@pytest.mark.parametrize(("flags", "wrong"), [
    (("--length_penalty", "0.9"), "--length_penalty 0.9 is a rule of the beam search: give --num_beams 2"),
    (("--no_repeat_ngram_size", "4"), "--no_repeat_ngram_size 4 is a rule of the beam search"),
    (("--num_beams", "2", "--length_penalty", "nan"), "must be a number"),
])
def test_rules_of_a_search_without_beams_are_refused(flags, wrong):
    result = call("scripts/evaluate.py", "--run", "nowhere", *flags)
    assert result.code != 0 and wrong in result.err
