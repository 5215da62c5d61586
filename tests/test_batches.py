"""recipes.common.batches: every row once, little padding, and the same training however the rows of a step are grouped."""

import json
import os
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DIALOGUES, ROOT
from datasets import Dataset
from test_methods import run_recipe
from test_resume import curve, same, trained
from test_trainer import METHODS, TASK, assert_same_trajectory, collate, make_model, make_rows
from transformers import TrainingArguments, set_seed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipes.common import args, batches, models, runs, tasks
from recipes.common.errors import UserError
from recipes.common.trainer import RecipeTrainer


def draw_lengths(count, seed=0, low=5, high=60):
    return np.random.default_rng(seed).integers(low, high, count).tolist()


def cost(groups, lengths, overhead):
    return sum(overhead + len(group) * max(lengths[i] for i in group) for group in groups)


def positions(groups, lengths):
    return cost(groups, lengths, 0)


# Groups


def check_groups(groups, lengths, limit):
    """Each row in one group; no group of several rows above the limit; the longest rows first."""
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limit for group in groups)
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("overhead", [0, 7, 40])
@pytest.mark.parametrize("limit", [1, 50, 120, 10_000])
def test_the_cheapest_groups_are_found(limit, overhead):
    lengths = draw_lengths(8)
    groups = batches.split(lengths, limit, overhead)
    check_groups(groups, lengths, limit)
    order, prices = sorted(lengths), []
    for cuts in (cuts for count in range(8) for cuts in combinations(range(1, 8), count)):  # every way to cut the sorted rows
        tried = [order[start:end] for start, end in zip((0, *cuts), (*cuts, 8), strict=True)]
        if all(len(group) == 1 or len(group) * group[-1] <= limit for group in tried):
            prices.append(sum(overhead + len(group) * group[-1] for group in tried))
    assert cost(groups, lengths, overhead) == min(prices)


def test_wrong_groups_are_found():
    for wrong in ([[0], [1]], [[2, 1], [0], [0]], [[0, 1, 2]], [[0], [1, 2]]):
        with pytest.raises(AssertionError):
            check_groups(wrong, [10, 20, 30], limit=50)


@pytest.mark.parametrize("count, low, high", [(8, 125, 768), (32, 55, 139), (8, 55, 139), (64, 5, 768)])
def test_padding_stays_below_two_percent(count, low, high):
    for seed in range(20):
        lengths = draw_lengths(count, seed, low, high)
        groups = batches.split_tightly(lengths, 768, 48, 0.02)
        check_groups(groups, lengths, 768)
        assert sum(lengths) >= 0.98 * positions(groups, lengths)
        assert sum(lengths) < 0.9 * count * max(lengths)  # what one batch would waste


def test_rows_of_one_length_run_together_without_padding():
    assert [len(group) for group in batches.split_tightly([40] * 32, 768, 48, 0.0)] == [19, 13]


def test_an_accelerator_takes_what_its_memory_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9))
    config = SimpleNamespace(num_hidden_layers=30, hidden_size=576, vocab_size=49_152)
    config.get_text_config = lambda: config
    weight = torch.nn.Parameter(torch.empty(134_515_008, device="meta"))
    model = SimpleNamespace(device=torch.device("cuda"), config=config, parameters=lambda: [weight])
    group = batches.grouping(model, bf16=True, limit=0)
    tokens = group.keywords["limit"]
    # A token takes 30 x 34 x 576 + 6 x 49,152 bytes = 0.88 MB; half of the 78 GB beside weights and moments hold 44,000.
    assert 40_000 < tokens < 48_000
    assert batches.grouping(model, bf16=False, limit=0).keywords["limit"] == pytest.approx(tokens / 2, rel=1e-3)
    assert batches.grouping(model, bf16=True, limit=99).keywords["limit"] == 99


# Steps by tokens


@pytest.mark.parametrize("processes", [1, 3])
def test_each_step_holds_about_the_tokens_asked_for(processes):
    lengths = draw_lengths(500)
    samplers = [batches.StepsByTokens(lengths, 1000, 42, processes=processes, process=i) for i in range(processes)]
    shares = list(zip(*samplers, strict=True))
    assert len(shares) == len(samplers[0]) == -(-sum(lengths) // 1000)
    assert sorted(i for step in shares for share in step for i in share) == list(range(500))  # each row once
    for step in shares:
        tokens = [sum(lengths[i] for i in share) for share in step]
        assert 940 <= sum(tokens) <= 1060 and max(tokens) - min(tokens) < 60


def test_the_order_is_random_and_repeatable():
    lengths = draw_lengths(100)
    sampler, again, other = (batches.StepsByTokens(lengths, 300, seed) for seed in (1, 1, 2))
    first = list(sampler)
    assert first == list(again) != list(other)
    again.set_epoch(1)
    assert list(again) != first and sorted(sum(again, [])) == sorted(sum(first, []))
    assert sorted(sum(first[:5], [])) != list(range(len(sum(first[:5], []))))
    in_order = sum((sorted(step) for step in batches.StepsByTokens(lengths, 300, 1, shuffle=False)), [])
    assert in_order == list(range(100))


@pytest.mark.parametrize("lengths, tokens, processes, steps", [
    ([10] * 8, 20, 1, 4), ([10] * 7, 20, 1, 4), ([10] * 8, 10_000, 1, 1), ([10] * 8, 10, 2, 4), ([90, 1, 1, 1, 1, 90], 90, 1, 3)])
def test_no_step_is_empty(lengths, tokens, processes, steps):
    for epoch in range(5):
        samplers = [batches.StepsByTokens(lengths, tokens, 0, processes=processes, process=i) for i in range(processes)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
            assert len(sampler) == len(list(sampler)) == steps and all(sampler)


# The same training


def trajectory(method, folder, shared=None, rows=13, **options):
    model = make_model("llama", method)
    set_seed(5)
    options = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.1} | options
    training = TrainingArguments(str(folder), logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
                                 include_num_input_tokens_seen="non_padding", **options)
    trainer = RecipeTrainer(model=model, args=training, task=TASK, shared=shared or args.SharedArguments(), callbacks=[],
                            data_collator=collate, train_dataset=Dataset.from_list(make_rows(rows)))
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, (curve, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_no_step(method, tmp_path):
    expected, whole = trajectory(method, tmp_path)
    for tokens in (0, 60):  # automatic; a few rows together
        trainer, got = trajectory(method, tmp_path, args.SharedArguments(micro_batch_tokens=tokens))
        assert_same_trajectory(got, whole)
        assert trainer.state.num_input_tokens_seen == expected.state.num_input_tokens_seen
        assert trainer.state.total_flos <= expected.state.total_flos  # the Trainer counts padding too
        assert trainer.padding_share < 0.02 < 0.2 < expected.padding_share


@pytest.mark.parametrize("technique", [{"adversarial": "fgm"}, {"adversarial": "pgd"}, {"r_drop": 1.0}])
def test_micro_batches_change_no_technique(technique, tmp_path, monkeypatch):
    # Where nothing is dropped, R-Drop's passes agree; both are counted all the same, and can be compared.
    monkeypatch.setattr("recipes.common.trainer._has_dropout", lambda model: True)

    def run(**shared):
        return trajectory("lora", tmp_path, args.SharedArguments(**technique, **shared))[1]

    assert_same_trajectory(run(micro_batch_tokens=60), run())


class Forgetful(RecipeTrainer):
    """Broken: a step's last micro-batch alone counts the items that the loss is divided by."""

    def _get_num_items_in_batch(self, batch_samples, device):
        return super()._get_num_items_in_batch([batch[-1:] for batch in batch_samples], device)


def test_a_loss_divided_by_the_items_of_one_micro_batch_is_caught(tmp_path, monkeypatch):
    whole = trajectory("lora", tmp_path)[1]
    monkeypatch.setitem(globals(), "RecipeTrainer", Forgetful)
    with pytest.raises(AssertionError):
        assert_same_trajectory(trajectory("lora", tmp_path, args.SharedArguments(micro_batch_tokens=60))[1], whole)


# Packed rows


def test_packed_groups_hold_no_more_than_the_limit():
    assert batches.fill([3, 4, 2, 9, 1, 1], limit=7) == [[0, 1], [2], [3], [4, 5]]


def test_rows_are_packed_without_their_padding():
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
             "labels": torch.tensor([[5, 6, -100], [8, 9, -100]])}
    packed = {name: tensor.tolist() for name, tensor in batches.pack(batch).items()}
    assert packed == {"input_ids": [[5, 6, 7, 8, 9]], "position_ids": [[0, 1, 2, 0, 1]], "labels": [[-100, 6, -100, -100, 9]]}
    assert batch["labels"][0, 0] == 5


@pytest.fixture
def packing(monkeypatch):
    """A CPU has no kernel that skips what lies between packed rows; these get the same result from a mask."""
    monkeypatch.setattr(batches, "PACKED_BY", ("sdpa", "eager", "cpu_blocks"))


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "auto"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "prefix"])
def test_packed_rows_see_nothing_of_each_other(method, kernel, packing, tmp_path):
    whole = trajectory(method, tmp_path)[1]
    for tokens in (0, 60):
        trainer, got = trajectory(method, tmp_path, args.SharedArguments(micro_batch_tokens=tokens, attention=kernel))
        assert trainer.packed and trainer.padding_share == 0
        assert_same_trajectory(got, whole)


def test_rows_that_see_each_other_are_caught(packing, tmp_path, monkeypatch):
    whole, pack = trajectory("lora", tmp_path)[1], batches.pack

    def leaking(batch):
        packed = pack(batch)
        return packed | {"position_ids": torch.arange(packed["input_ids"].shape[1])[None]}

    monkeypatch.setattr(batches, "pack", leaking)
    with pytest.raises(AssertionError):
        assert_same_trajectory(trajectory("lora", tmp_path, args.SharedArguments(attention="sdpa"))[1], whole)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_both_kernels_of_packing_are_told_where_rows_end(kind, monkeypatch):
    """What transformers hands to flex and flash attention for packed rows: a mask that keeps them apart, or the positions themselves."""
    model = make_model(kind, "full").eval()
    first, second = torch.arange(3, 9), torch.arange(4, 15)
    packed = {"input_ids": torch.cat([first, second])[None],
              "position_ids": torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]}
    seen = {}

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.update(mask=attention_mask, positions=kwargs.get("position_ids"))
        return query.transpose(1, 2).contiguous(), None

    for kernel in batches.PACKED_BY:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, kernel, spy)
        model.config._attn_implementation_internal = kernel
        with torch.no_grad():
            model(**packed, use_cache=False)
        if kernel == "flex_attention":
            where = torch.arange(17)
            allowed = torch.stack([torch.stack([seen["mask"].mask_mod(0, 0, q, k) for k in where]) for q in where])
            row = (where >= 6).long()
            assert (allowed == ((row[:, None] == row[None]) & (where[None] <= where[:, None]))).all()
        else:
            assert seen["mask"] is None and (seen["positions"] == packed["position_ids"]).all()


@pytest.mark.parametrize("method, technique, packed", [("lora", {}, True), ("lora", {"adversarial": "fgm"}, False), ("prefix", {}, False)])
def test_what_needs_its_rows_apart_is_not_packed(method, technique, packed, packing, tmp_path):
    trainer, got = trajectory(method, tmp_path, args.SharedArguments(micro_batch_tokens=60, **technique))
    assert trainer.packed == packed
    assert_same_trajectory(got, trajectory(method, tmp_path, args.SharedArguments(**technique))[1])


# In a run


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, own in (("train", (DIALOGUES * 3)[:11]), ("dev", DIALOGUES[:2])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own), encoding="utf-8")
    return folder


FLAGS = ("--num_train_epochs", "2", "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no",
         "--learning_rate", "0.01")


@pytest.mark.parametrize("flags, steps", [((), 4), (("--tokens_per_step", "150"), 8)])
def test_a_run_resumes_exactly_and_reports_its_padding(flags, steps, tiny, data, tmp_path, capsys):
    flags = (*FLAGS, *flags, "--dropout", "0.1", "--micro_batch_tokens", "120", "--save_total_limit", "9")
    through = run_recipe("lora", tiny("gpt2"), data, tmp_path / "through", *flags)
    said = capsys.readouterr().out
    assert through.state.global_step == steps and ("150 tokens a step" if "150" in flags else "8 rows a step") in said
    record = json.loads((tmp_path / "through/run.json").read_text(encoding="utf-8"))
    assert 0 <= record["padding_share"] <= 0.02 and f"{100 * record['padding_share']:.1f} % padding" in said
    assert record["tokens"] == 2 * record["data"]["splits"]["train"]["tokens"]
    for checkpoint in sorted({2, steps - 2}):  # within the first epoch, or at its end; within the second. A folder is finished once.
        resumed = run_recipe("lora", tiny("gpt2"), data, tmp_path / f"from-{checkpoint}", *flags,
                             "--resume_from_checkpoint", str(tmp_path / f"through/checkpoint-{checkpoint}"))
        assert curve(resumed, "loss") == curve(through, "loss")
        assert same(trained(resumed.model), trained(through.model))


def test_adalora_plans_the_steps_that_tokens_make(tiny, data, tmp_path):
    trainer = run_recipe("adalora", tiny("llama"), data, tmp_path / "run", *FLAGS, "--tokens_per_step", "120", "--init_rank", "4",
                         "--target_rank", "2", "--every", "1")
    assert trainer.state.global_step == runs.steps(11, trainer.args, trainer.task.steps) == 2 * trainer.task.steps > 4


@pytest.mark.parametrize("flags, words", [
    (("--tokens_per_step", "20"), "--tokens_per_step 20: the longest train row has"),
    (("--tokens_per_step", "200", "--gradient_accumulation_steps", "2"), "leave --gradient_accumulation_steps out"),
    (("--tokens_per_step", "200", "--train_sampling_strategy", "group_by_length"), "--train_sampling_strategy group_by_length"),
    (("--attention", "flash_attention_2"), "--attention flash_attention_2: .*[Ff]lash"),
])
def test_refused(flags, words, tiny, data, tmp_path):
    with pytest.raises(UserError, match=words):
        run_recipe("lora", tiny("llama"), data, tmp_path / "run", *FLAGS, *flags)


def test_batch_flags_are_obeyed(tiny, data, tmp_path, capsys):
    def parse(*flags):
        shared, _, training = args.parse("", args.Method, [*flags, "--use_cpu"])
        return shared.micro_batch_tokens, training.per_device_train_batch_size, training.gradient_accumulation_steps

    assert parse() == (0, 8, 1)
    assert parse("--task", "classify") == (0, 32, 1)
    assert parse("--micro_batch_tokens", "500") == (500, 8, 1)
    assert parse("--gradient_accumulation_steps", "4") == (None, 8, 4)
    assert parse("--per_device_train_batch_size", "2", "--micro_batch_tokens", "0") == (0, 2, 1)
    assert parse("--per_device_train_batch_size", "2", "--tokens_per_step", "900") == (0, 2, 1)
    assert "note: --tokens_per_step decides" in capsys.readouterr().out
    trainer = run_recipe("lora", tiny("llama"), data, tmp_path / "run", *FLAGS, "--per_device_train_batch_size", "11")
    assert trainer.padding_share > 0.1 and trainer.state.global_step == 2


def test_every_task_can_be_grouped(tiny, tmp_path):
    """A collator's columns of another width than the text (targets, labels) are made for each group alone."""
    kind = tasks.module("translate")
    shared = args.SharedArguments(task="translate", max_length=60)
    source = models.resolve(str(tiny("t5")))
    task = kind.make(shared, source, models.load_tokenizer(source), {})
    rows = [{"source": "a" * n, "target": "b" * (30 - n)} for n in (2, 25, 8, 24)]
    features, counts = task.encode(rows, "rows")
    lengths = batches.lengths(features, task.texts)
    assert sum(lengths) == counts["tokens"] and len(set(lengths)) == 1  # source and target together, and what ends each
    made = batches.collate(list(features), task.collate, lambda lengths: batches.split(lengths, 60, 1), task.texts)
    assert len(made) > 1 and sum(len(batch["labels"]) for batch in made) == 4
    assert sum(int(batches.real(batch, task.texts).sum()) for batch in made) == counts["tokens"]
    for batch in made:
        assert batch["attention_mask"].any(0).all() and (batch["labels"] != -100).any(0).all()


def test_two_processes_take_the_steps_of_one(tiny, data, tmp_path):
    flags = (*FLAGS, "--tokens_per_step", "150", "--micro_batch_tokens", "60", "--optim", "sgd", "--save_strategy", "no")
    alone = run_recipe("lora", tiny("llama"), data, tmp_path / "alone", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
               "scripts/train.py", "--recipe", "lora", "--model", tiny("llama"), "--data", data,
               "--output_dir", tmp_path / "two", "--max_length", "150", "--use_cpu", "--no_bf16",
               "--report_to", "none", *flags]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8")) for name in ("alone", "two"))
    assert "--nproc_per_node 2" in two["command"] and one["steps"] == two["steps"] == 8 and one["tokens"] == two["tokens"]
    losses = [[entry["loss"] for entry in record["history"] if "loss" in entry] for record in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(set(losses[0])) > 4
    assert two["metrics"]["dev_loss"] == pytest.approx(alone.state.log_history[-1]["eval_loss"], rel=1e-5)
    assert two["padding_share"] <= 0.02
