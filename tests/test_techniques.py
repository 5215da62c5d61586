"""Layer-wise rates, model dropout, adversarial embeddings and R-Drop: what each does to a step, with several methods and models."""

import dataclasses
import re

import pytest
import torch
from conftest import DIALOGUES, tiny_config
from datasets import Dataset
from test_methods import run_recipe
from test_resume import STEPS as TWELVE_STEPS
from test_resume import VARIANTS as RESUMED
from test_resume import Interrupted, Killed, curve, same, trained
from test_trainer import METHODS, TASK, collate, make_model, make_rows
from test_translate import batch_of, task_for
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BloomConfig,
    GPTNeoXConfig,
    MambaConfig,
    TrainingArguments,
    set_seed,
)

from recipes.common import args, losses, models, regularize, tasks
from recipes.common.errors import UserError
from recipes.common.trainer import RecipeTrainer


def trainer_for(model, folder, train=None, task=TASK, **shared):
    options = {name: shared.pop(name) for name in list(shared) if name not in args.SharedArguments.__dataclass_fields__}
    options = {"learning_rate": 0.1, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
               "optim": "sgd"} | options
    set_seed(5)
    return RecipeTrainer(model=model, args=TrainingArguments(output_dir=str(folder), **options), task=task, callbacks=[],
                         shared=args.SharedArguments(**shared), data_collator=task.collate,
                         train_dataset=Dataset.from_list(train or make_rows(4)))


def gradients(trainer, rows, times=1):
    model = trainer.model
    model.zero_grad()
    for _ in range(times):
        loss = trainer.training_step(model, [collate(rows)], torch.tensor(sum(label != -100 for r in rows for label in r["labels"][1:])))
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


# Learning rates by layer


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"prefix"}))
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_each_block_learns_slower_than_the_one_above(kind, method, tmp_path):
    trainer = trainer_for(make_model(kind, method), tmp_path, layer_lr_decay=0.5)
    groups = trainer.create_optimizer().param_groups
    assert trainer.create_optimizer().param_groups == groups  # a second training of the same trainer goes on with the same rates
    assert groups[0]["lr"] == max(group["lr"] for group in groups)  # the rate that the log shows
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        level = 0 if "embed_tokens" in name or "wte" in name or "wpe" in name else 3 if block is None else block + 1
        assert rate == pytest.approx(0.1 * 0.5 ** (3 - level)), name
    plain = {p for group in trainer_for(make_model(kind, method), tmp_path).create_optimizer().param_groups for p in group["params"]}
    assert len(plain) == len(rates)


BART = {"vocab_size": 50, "d_model": 16, "max_position_embeddings": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
OTHERS = {  # model and where its two blocks (of either side) and its embeddings are
    "bert": (AutoModelForSequenceClassification, lambda: tiny_config("bert", 50), "bert.encoder.layer.", r"bert\.embeddings"),
    "t5": (AutoModelForSeq2SeqLM, lambda: tiny_config("t5", 50), "coder.block.", "shared"),
    "bart": (AutoModelForSeq2SeqLM, lambda: BartConfig(**BART), "coder.layers.", "embed|shared"),
    "bloom": (AutoModelForCausalLM, lambda: BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2), "transformer.h.", "embed"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_depth_is_that_of_the_model_whatever_its_names(kind):
    auto_class, config, blocks, embeddings = OTHERS[kind]
    model = auto_class.from_config(config())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    regularize.decay_by_layer(optimizer, model.named_parameters(), 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    seen = set()
    for name, parameter in model.named_parameters():
        level = int(name.partition(blocks)[2][0]) + 1 if blocks in name else 0 if re.search(embeddings, name) else 3
        seen.add(level)
        assert rates[id(parameter)] == 0.5 ** (3 - level), name
    assert seen >= {0, 1, 2}


def test_rates_by_layer_are_refused_where_nothing_trained_is_in_a_layer(tmp_path):
    with pytest.raises(UserError, match="--layer_lr_decay: nothing that is trained here belongs to a block"):
        trainer_for(make_model("gpt2", "prefix"), tmp_path, layer_lr_decay=0.5).create_optimizer()


def test_weight_decay_stays_with_its_parameters(tmp_path):
    trainer = trainer_for(make_model("llama", "full"), tmp_path, layer_lr_decay=0.5, weight_decay=0.01)
    decayed = {id(p) for group in trainer.create_optimizer().param_groups if group["weight_decay"] for p in group["params"]}
    plain = trainer_for(trainer.model, tmp_path, weight_decay=0.01).create_optimizer()
    assert decayed == {id(p) for group in plain.param_groups if group["weight_decay"] for p in group["params"]} and decayed


# Dropout


def test_model_dropout_reaches_every_dropout_of_the_model(tiny, tmp_path, write_jsonl):
    file = write_jsonl(DIALOGUES)
    trainer = run_recipe("full", tiny("gpt2"), file, tmp_path / "run", "--model_dropout", "0.3", "--max_steps", "1",
                         "--load_best_model_at_end", "False")
    found = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert found == {0.3}
    assert AutoModelForCausalLM.from_pretrained(tiny("gpt2")).config.resid_pdrop == 0.1


def test_model_dropout_is_refused_by_a_model_without_any(tiny, tmp_path, write_jsonl):
    AutoModelForCausalLM.from_config(MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match="--model_dropout: .*mamba has no dropout"):
        run_recipe("full", tmp_path / "mamba", write_jsonl(DIALOGUES), tmp_path / "run", "--model_dropout", "0.1")
    assert not (tmp_path / "run").exists()


# R-Drop


def part(logits, targets):
    return losses.Part(torch.tensor(logits), torch.tensor(targets), torch.ones(len(targets), 1, dtype=torch.bool))


def test_the_divergence_is_that_of_the_definition():
    one, other = part([[1.0, 2.0, 0.5]], [0]), part([[0.0, 1.0, 3.0]], [0])
    p, q = torch.tensor([1.0, 2.0, 0.5]).softmax(0), torch.tensor([0.0, 1.0, 3.0]).softmax(0)
    expected = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
    torch.testing.assert_close(regularize.divergence([one], [other]), expected)
    assert regularize.divergence([one], [one]) == 0
    yes, no = part([[0.7]], [[1.0]]), part([[-0.2]], [[1.0]])
    a, b = torch.tensor(0.7).sigmoid(), torch.tensor(-0.2).sigmoid()
    two = (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log() + b * (b / a).log() + (1 - b) * ((1 - b) / (1 - a)).log()) / 2
    torch.testing.assert_close(regularize.divergence([yes], [no]), two)


def test_the_divergence_counts_items_as_the_loss_does():
    """By their weights (--class_weights, the answer to BERT's second task), and none for a row without an answer."""
    def parts(weights, ignored=False):
        targets = [0, losses.IGNORE if ignored else 1]
        return [dataclasses.replace(part(logits, targets), weights=weights and torch.tensor(weights))
                for logits in ([[1.0, 2.0], [0.5, -1.0]], [[0.0, 1.5], [2.0, 0.0]])]

    def divergence(*options, **others):
        one, other = parts(*options, **others)
        return regularize.divergence([one], [other])

    plain, first = divergence(None), divergence(None, ignored=True)
    assert 0 < first < plain
    torch.testing.assert_close(divergence([3.0, 0.5]), 3 * first + 0.5 * (plain - first))
    torch.testing.assert_close(divergence([3.0, 0.5], ignored=True), 3 * first)


def test_r_drop_weights_both_its_terms_as_the_plain_loss(tiny, tmp_path):
    rows = [{"text": text, "label": label} for text, label in (("red", "a"), ("dark red", "a"), ("pale red", "a"), ("blue", "b"))]
    found = {}
    for weighting in ("none", "balanced"):
        task = tasks.without_data(args.SharedArguments(task="classify", model=str(tiny("bert")), class_weights=weighting),
                                  models.resolve(str(tiny("bert"))), rows)
        set_seed(3)
        model = task.load_model()
        batch = task.collate(task.encode(rows, "x", training=True)[0])
        trainer = trainer_for(model, tmp_path, task=task, r_drop=2.0)
        model.train()
        set_seed(1)
        loss = trainer.compute_loss(model, batch)
        set_seed(1)
        [first], [second] = trainer._parts(model, batch), trainer._parts(model, batch)
        weights = batch.get("weights", torch.ones(4))
        assert weighting == "none" or weights.tolist() == pytest.approx([2 / 3] * 3 + [2])
        p, q = first.log_probabilities(), second.log_probabilities()
        nll = -(p + q)[range(4), first.targets] / 2
        expected = (weights * (nll + 2 * ((p.exp() - q.exp()) * (p - q)).sum(1) / 2)).mean()
        torch.testing.assert_close(loss, expected)
        found[weighting] = loss.item()
    assert found["none"] != pytest.approx(found["balanced"], rel=1e-4)


def test_r_drop_adds_the_divergence_of_two_passes(tmp_path):
    set_seed(3)
    model = make_model("gpt2", "full")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    rows = collate(make_rows(4))
    trainer = trainer_for(model, tmp_path, r_drop=2.0)
    model.train()
    set_seed(1)
    loss = trainer.compute_loss(model, rows)
    set_seed(1)
    first, second = trainer._parts(model, rows), trainer._parts(model, rows)
    nll = [parts[0].nll() for parts in (first, second)]
    expected = (nll[0].mean() + nll[1].mean()) / 2 + 2 * regularize.divergence(first, second) / len(nll[0])
    torch.testing.assert_close(loss, expected)
    assert not torch.equal(nll[0], nll[1])


def test_r_drop_without_dropout_is_refused(tmp_path):
    with pytest.raises(UserError, match="--model_dropout 0.1"):
        trainer_for(make_model("llama", "lora"), tmp_path, r_drop=1.0)
    neox = GPTNeoXConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    assert neox.classifier_dropout == 0.1  # of a head that this model has not
    with pytest.raises(UserError, match="--model_dropout 0.1"):
        trainer_for(AutoModelForCausalLM.from_config(neox), tmp_path, r_drop=1.0)


# Adversarial embeddings


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_a_disturbance_of_size_zero_is_the_same_step_twice(method, kind, tmp_path):
    rows = make_rows(3)
    plain_loss, plain = gradients(trainer_for(make_model(kind, method).eval(), tmp_path), rows, times=2)
    for kind_of_attack in ("fgm", "pgd"):
        trainer = trainer_for(make_model(kind, method).eval(), tmp_path, adversarial=kind_of_attack, adversarial_epsilon=0.0)
        loss, got = gradients(trainer, rows)
        torch.testing.assert_close(loss, plain_loss)
        for name in plain:
            torch.testing.assert_close(got[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_disturbance_raises_the_loss_more_than_a_random_one_and_pgd_finds_a_worse_one(method, tmp_path):
    model, rows = make_model("llama", method), collate(make_rows(6))
    model.train = lambda mode=True: model  # without dropout, so that passes compare
    seen = {}
    for attack in ("fgm", "pgd"):
        trainer = trainer_for(model, tmp_path, adversarial=attack, adversarial_epsilon=0.3)
        adversary, passes = trainer.adversary, []

        def clean_pass(trainer=trainer, passes=passes, adversary=adversary):
            loss = trainer.compute_loss(model, dict(rows))
            loss.backward()
            passes.append((float(loss), adversary.delta))
            return loss

        adversary.train(clean_pass, lambda trainer=trainer: trainer.compute_loss(model, dict(rows)), rows["attention_mask"])
        seen[attack] = passes[1][0] - passes[0][0]
        delta = passes[1][1].detach()
        clean = losses.network(model).get_input_embeddings().weight[rows["input_ids"]].detach() * rows["attention_mask"][..., None]
        size, radius = delta.flatten(1).norm(dim=1), 0.3 * clean.flatten(1).norm(dim=1)
        assert (size <= radius * 1.001).all() and (attack == "pgd" or torch.allclose(size, radius, rtol=1e-3))
        assert not delta[rows["attention_mask"] == 0].any()  # padding is left alone
        adversary.delta = torch.randn_like(delta) * rows["attention_mask"][..., None]
        adversary.delta *= delta.flatten(1).norm(dim=1)[:, None, None] / adversary.delta.flatten(1).norm(dim=1)[:, None, None]
        with torch.no_grad():
            random = float(trainer.compute_loss(model, dict(rows))) - passes[0][0]
        adversary.delta = None
        assert seen[attack] > max(0, 2 * random)
    assert seen["pgd"] > 0.9 * seen["fgm"]


@pytest.mark.parametrize("attack", ["fgm", "pgd"])
def test_an_encoder_decoder_is_disturbed_where_it_reads(attack, tiny, tmp_path):
    """T5 never calls the table that its two sides share, which get_input_embeddings() gives."""
    task, passes = task_for(tiny("t5")), []
    model, (batch, counts) = task.load_model().eval(), batch_of(task)
    model.train = lambda mode=True: model  # without dropout, so that passes compare
    trainer = trainer_for(model, tmp_path, task=task, adversarial=attack, adversarial_epsilon=0.3)
    compute = trainer.compute_loss

    def watched(*args, **kwargs):
        loss = compute(*args, **kwargs)
        passes.append((loss.item(), trainer.adversary.delta.detach().clone()))
        return loss

    trainer.compute_loss = watched
    trainer.training_step(model, [batch], torch.tensor(counts["supervised"]))
    assert len(passes) == (2 if attack == "fgm" else 4)
    (clean, nothing), (disturbed, delta) = passes[0], passes[-1]
    assert disturbed > clean and not nothing.any()
    assert delta.shape == (*batch["input_ids"].shape, 32) and not delta[batch["attention_mask"] == 0].any()


def test_frozen_embeddings_stay_as_they_are(tmp_path):
    model = make_model("llama", "lora")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer_for(model, tmp_path, adversarial="fgm", max_steps=2).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not p.requires_grad)


TECHNIQUES = [{"adversarial": "fgm"}, {"adversarial": "pgd"}, {"layer_lr_decay": 0.7}, {"r_drop": 2.0},
              {"adversarial": "fgm", "r_drop": 2.0}]


def second_pass_differs(trainer):
    """Dropout that is the same in any batch: every second pass is 0.7 times as sure."""
    plain, calls = trainer._parts, []

    def parts(model, inputs):
        [part] = plain(model, inputs)
        calls.append(part)
        return [dataclasses.replace(part, logits=part.logits * (0.7 if len(calls) % 2 == 0 else 1.0))]

    trainer._parts = parts


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda technique: "-".join(map(str, technique.values())))
def test_a_batch_of_8_still_equals_8_accumulated_rows(technique, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.common.trainer._has_dropout", lambda model: True)
    found = []
    for batch, accumulation in ((8, 1), (1, 8)):
        model = make_model("llama", "full")
        trainer = trainer_for(model, tmp_path, train=make_rows(13), per_device_train_batch_size=batch, num_train_epochs=2,
                              gradient_accumulation_steps=accumulation, **technique)
        if "r_drop" in technique:
            second_pass_differs(trainer)
        trainer.train()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


def test_the_comparison_of_batches_rejects_a_divergence_that_ignores_the_items_of_the_step(tmp_path, monkeypatch):
    whole = regularize.divergence
    monkeypatch.setattr(regularize, "divergence", lambda one, other: whole(one, other) / len(one[0].targets))
    with pytest.raises(AssertionError):
        test_a_batch_of_8_still_equals_8_accumulated_rows({"r_drop": 50.0}, tmp_path, monkeypatch)


@pytest.mark.parametrize(("variant", "flags"), [
    ("lora", ("--adversarial", "fgm", "--r_drop", "1")), ("full", ("--adversarial", "pgd")), ("full", ("--r_drop", "1")),
    ("lora", ("--layer_lr_decay", "0.5", "--model_dropout", "0.2"))], ids=str)
def test_interrupted_and_resumed_equals_uninterrupted(variant, flags, tiny, tmp_path, write_jsonl):
    rows, own = write_jsonl((DIALOGUES * 3)[:12]), ("--dev_fraction", "0.08", *TWELVE_STEPS, *flags)
    recipe, *extra = RESUMED[variant]
    through = run_recipe(recipe, tiny("gpt2"), rows, tmp_path / "through", *extra, *own)
    with pytest.raises(Killed):
        run_recipe(recipe, tiny("gpt2"), rows, tmp_path / "killed", *extra, *own, trainer_class=Interrupted)
    resumed = run_recipe(recipe, tiny("gpt2"), rows, tmp_path / "killed", *extra, *own, "--resume_from_checkpoint")
    assert len(curve(through, "loss")) == 12
    for key in ("loss", "grad_norm", "learning_rate"):
        assert curve(resumed, key) == curve(through, key)
    assert same(trained(resumed.model), trained(through.model))


@pytest.mark.parametrize(("flags", "words"), [
    (("--adversarial", "fgm"), "fgm"), (("--r_drop", "1"), "r_drop"), (("--layer_lr_decay", "0.8"), "decay")])
def test_a_run_with_a_technique_differs_and_repeats(flags, words, tiny, tmp_path, write_jsonl):
    file = write_jsonl(DIALOGUES)
    own = ("--max_steps", "3", "--logging_steps", "1", "--load_best_model_at_end", "False", "--eval_strategy", "no",
           "--save_strategy", "no", "--learning_rate", "0.01")
    curves = []
    for name, extra in (("plain", ()), ("one", flags), ("two", flags)):
        trainer = run_recipe("full", tiny("gpt2"), file, tmp_path / name, *own, *extra)
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[1] == curves[2] != curves[0]


# The learning rate


@pytest.mark.parametrize(("steps", "flags", "rates", "told"), [
    (1, {"warmup_steps": 0.1}, [0.1], True), (2, {"warmup_steps": 0.1}, [0, 0.1], False), (3, {"warmup_steps": 0.1}, [0, 0.1, 0.05], False),
    (3, {"warmup_steps": 7}, [0, 0.05, 0.1], True), (1, {"warmup_steps": 0.1, "lr_scheduler_type": "constant"}, [0.1], False)])
def test_a_warm_up_is_never_the_whole_training(steps, flags, rates, told, tmp_path, capsys):
    """Of one step, whose rate would be 0, no training would be left."""
    trainer = trainer_for(make_model("gpt2", "full"), tmp_path, max_steps=steps, **{"lr_scheduler_type": "linear"} | flags)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert list(curve(trainer, "learning_rate").values()) == pytest.approx(rates)
    assert not same(before, dict(trainer.model.named_parameters()))
    assert ("would be the whole training" in capsys.readouterr().out) == told == bool(trainer.watch.events)
    assert trainer.args.warmup_steps == flags["warmup_steps"]
