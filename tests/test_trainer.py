"""The loss of recipes.common.trainer against plain full-logits computations, and what the Trainer makes of it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma2Config, T5Config, T5ForConditionalGeneration, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LabelSmoother

from recipes import adapter, full, lora, prefix
from recipes.common import args, losses, trainer
from recipes.common.chat import IGNORE, pad
from recipes.common.errors import UserError
from recipes.common.losses import only_positions
from recipes.common.scoring import dataset_outputs
from recipes.common.trainer import RecipeTrainer

KINDS = ("gpt2", "llama", "qwen3")
METHODS = {
    "lora": lambda model: lora.adapt(model, TASK, lora.MethodArguments(rank=4), None)[0],
    "prefix": lambda model: prefix.adapt(model, TASK, prefix.MethodArguments(num_virtual_tokens=5), None)[0],
    "adapter": lambda model: adapter.adapt(model, TASK, adapter.MethodArguments(bottleneck_size=4), None)[0],
    "full": lambda model: full.adapt(model, TASK, full.MethodArguments(), None)[0],
}
VOCABULARY, PAD = 400, 0


def make_model(kind, method):
    """A model whose every parameter matters: what a method starts at zero is moved away from it. No dropout."""
    set_seed(3)
    config = tiny_config(kind, VOCABULARY)
    config.initializer_range = 0.1
    if kind == "gpt2":
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    model = METHODS[method](AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and method != "full":
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def make_rows(count, seed=0):
    """Rows of 5 to 40 random tokens with one to three supervised spans, so that rows weigh very differently."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for _ in range(count):
        length = draw(5, 41)
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        labels = [IGNORE] * length
        for _ in range(draw(1, 4)):
            start = draw(1, length)
            end = min(length, start + draw(1, 9))
            labels[start:end] = ids[start:end]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows):
    return pad(rows, PAD)


TASK = SimpleNamespace(peft_type="CAUSAL_LM", new_modules=lambda: None, window=256, max_length=64, train=[{"input_ids": [5, 6, 7]}],
                       loss=losses.next_token, outputs=lambda parts: (), metrics=lambda *labels: {}, per_token=True, collate=collate,
                       texts=("input_ids",), old=None, callbacks=[])
SHARED = args.SharedArguments()


def row_sums(model, batch):
    return losses.row_sums(losses.next_token(model, batch))


def full_logits_loss(model, batch, label_smoothing=0.0):
    """The textbook way: logits everywhere, then transformers' own loss over them."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if label_smoothing:
        return LabelSmoother(label_smoothing)({"logits": logits}, batch["labels"], shift_labels=True)
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), batch["labels"][:, 1:].reshape(-1))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def make_trainer(model, folder, train=None, dev=None, trainer_class=RecipeTrainer, **options):
    set_seed(5)
    options = {"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True} | options
    return trainer_class(model=model, args=TrainingArguments(output_dir=str(folder), **options), task=TASK, shared=SHARED, callbacks=[],
                         data_collator=collate, train_dataset=Dataset.from_list(train) if train else None,
                         eval_dataset=Dataset.from_list(dev) if dev else None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_the_loss(kind, method):
    model, rows = make_model(kind, method), make_rows(5)

    def sums(batch):
        with torch.no_grad():
            return row_sums(model, batch)

    alone = torch.cat([sums(collate([row])) for row in rows])
    together = sums(collate(rows))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert together[:, 1].tolist() == [sum(label != IGNORE for label in row["labels"][1:]) for row in rows]

    wide = {name: F.pad(tensor, (0, 9), value=IGNORE if name == "labels" else 0) for name, tensor in collate(rows).items()}
    wide["input_ids"] = torch.where(wide["attention_mask"] == 1, wide["input_ids"], 123)  # whatever the pad token is
    torch.testing.assert_close(sums(wide), alone, rtol=1e-5, atol=1e-5)

    seen = wide | {"labels": torch.where(wide["attention_mask"] == 1, wide["labels"], 123)}  # padding that is trained on
    assert not torch.allclose(sums(seen), alone, rtol=1e-3)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_those_of_full_logits(kind, method, label_smoothing, tmp_path):
    model, batch = make_model(kind, method), collate(make_rows(6))
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=label_smoothing)
    expected = full_logits_loss(model, batch, label_smoothing)
    expected_gradients = gradients(model, expected)
    loss = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    got = gradients(model, loss)
    assert got.keys() == expected_gradients.keys()
    for name, gradient in got.items():
        assert expected_gradients[name].any(), f"{name} has no gradient, so nothing is compared"
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")

    tokens = int((batch["labels"][:, 1:] != IGNORE).sum())
    spread = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(3 * tokens))
    torch.testing.assert_close(3 * spread, loss, rtol=1e-5, atol=1e-6)


def test_the_comparison_rejects_a_loss_over_unshifted_positions(monkeypatch):
    model, batch = make_model("llama", "lora"), collate(make_rows(6))

    def unshifted(head, keep):
        return only_positions(head, torch.roll(keep, 1, dims=1))

    monkeypatch.setattr(losses, "only_positions", unshifted)
    [part] = losses.next_token(model, batch)
    assert abs(part.nll().mean() - full_logits_loss(model, batch)) > 0.01


def test_only_supervised_positions_reach_the_head_and_only_within_the_context():
    model, batch = make_model("llama", "prefix"), collate(make_rows(6))
    head, shapes = model.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    [part] = losses.next_token(model, batch)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    assert shapes == [(int(part.where.sum()), VOCABULARY), (*batch["input_ids"].shape, VOCABULARY)]


@pytest.mark.parametrize("how", ["no module", "weights only"])
def test_a_head_that_can_not_be_told_its_positions_falls_back_loudly(how, monkeypatch, capsys):
    model, batch = make_model("llama", "full"), collate(make_rows(6))
    [expected] = losses.next_token(model, batch)
    assert capsys.readouterr().out == ""
    if how == "no module":
        monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    else:  # the matrix is multiplied by hand, and the result is scaled
        class ByHand(torch.nn.Module):
            def forward(self, hidden):
                return 1.0 * F.linear(hidden, model.lm_head.weight)

        head, by_hand = model.lm_head, ByHand()
        monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: head)
        by_hand.weight = model.lm_head.weight
        monkeypatch.setitem(model._modules, "lm_head", by_hand)
    losses._say_once.cache_clear()
    for _ in range(2):
        [part] = losses.next_token(model, batch)
        torch.testing.assert_close(part.logits, expected.logits)
        torch.testing.assert_close(part.nll(), expected.nll())
    assert capsys.readouterr().out.count("the head of LlamaForCausalLM can't be told which positions are trained on") == 1


def test_logits_that_are_capped_after_the_head_are_those_of_all_positions():
    """Gemma 2's soft cap is elementwise, so the positions may be chosen before it."""
    set_seed(0)
    config = Gemma2Config(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05, initializer_range=0.1)
    model, batch = AutoModelForCausalLM.from_config(config).eval(), collate(make_rows(6))
    [part] = losses.next_token(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(part.logits, logits[:, :-1][part.where])
    assert 0.049 < part.logits.abs().max() < 0.0501  # the cap is reached


def test_a_head_that_sees_other_positions_is_refused():
    head = torch.nn.Linear(4, 6)
    with only_positions(head, torch.ones(1, 8, dtype=torch.bool)), pytest.raises(ValueError, match="sees 9 positions for 8 tokens"):
        head(torch.zeros(1, 9, 4))


@pytest.mark.parametrize("method", METHODS)
def test_dev_loss_weighs_every_token_alike_whatever_the_batch(method, tmp_path):
    model, rows = make_model("llama", method), make_rows(7, seed=1)
    nll, tokens, means = 0.0, 0, []
    for row in rows:  # by hand: one row at a time, all logits, summed in double precision
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        with torch.no_grad():
            logp = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double().log_softmax(-1)
        own = [-float(logp[t - 1, label]) for t, label in enumerate(labels) if t and label != IGNORE]
        nll, tokens, means = nll + sum(own), tokens + len(own), means + [sum(own) / len(own)]
    expected = nll / tokens

    for batch_size in (1, 3, 7):
        metrics = make_trainer(model, tmp_path, dev=rows, per_device_eval_batch_size=batch_size, label_smoothing_factor=0.2).evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert metrics["eval_perplexity"] == pytest.approx(2.718281828459045 ** expected, rel=1e-5)
    assert abs(sum(means) / len(means) - expected) > 1e-3 * expected  # a mean of row means would be told apart


def test_dataset_losses_keep_the_order_of_the_rows():
    model, rows = make_model("gpt2", "adapter"), make_rows(9)
    with torch.no_grad():
        alone = torch.cat([row_sums(model, collate([row])) for row in rows])
    for tokens_per_batch in (1, 64, 2048):
        sums = [torch.from_numpy(sums) for sums, in dataset_outputs(model, TASK, rows, "Loss", tokens_per_batch)]
        torch.testing.assert_close(torch.stack(sums), alone, rtol=1e-5, atol=1e-5)


def trajectory(method, folder, batch_size, accumulation, trainer_class=RecipeTrainer, kind="llama"):
    """(loss of each step, trained parameters at the end) of two epochs over 13 rows, so that every second step is a partial one.

    Plain gradient descent: Adam would divide by the gradient's size, which hides its scale and shows its rounding where it is tiny.
    """
    model = make_model(kind, method)
    trainer = make_trainer(model, folder, train=make_rows(13), trainer_class=trainer_class, per_device_train_batch_size=batch_size,
                           gradient_accumulation_steps=accumulation, num_train_epochs=2, optim="sgd", learning_rate=0.1)
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return curve, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_trajectory(one, other):
    (curve, parameters), (other_curve, other_parameters) = one, other
    assert len(curve) == 4
    assert curve == pytest.approx(other_curve, rel=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, other_parameters[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_8_equals_8_accumulated_rows(method, tmp_path):
    assert_same_trajectory(trajectory(method, tmp_path, 8, 1), trajectory(method, tmp_path, 1, 8))


class SumOfMeans(RecipeTrainer):
    """Broken: ignores the number of tokens in the step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class MeanOfMeans(RecipeTrainer):
    """Broken as Trainers were before transformers 4.46: each micro-batch counts the same, whatever its tokens."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs) / self.current_gradient_accumulation_steps


@pytest.mark.parametrize("broken", [SumOfMeans, MeanOfMeans])
def test_a_loss_that_ignores_the_tokens_of_the_step_is_caught(broken, tmp_path):
    with pytest.raises(AssertionError):
        assert_same_trajectory(trajectory("lora", tmp_path, 8, 1), trajectory("lora", tmp_path, 1, 8, broken))


def test_label_smoothing_reaches_training_but_not_the_dev_loss(tmp_path):
    rows, model = make_rows(4), make_model("llama", "full")
    plain = make_trainer(model, tmp_path, train=rows, dev=rows)
    smooth = make_trainer(model, tmp_path, train=rows, dev=rows, label_smoothing_factor=0.1)
    batch = collate(rows)
    assert abs(plain.compute_loss(model, dict(batch)) - smooth.compute_loss(model, dict(batch))) > 1e-3
    assert plain.evaluate()["eval_loss"] == smooth.evaluate()["eval_loss"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_are_held_in_bf16_only_when_asked(method, bf16, tmp_path):
    model = make_model("llama", method)
    trainer = make_trainer(model, tmp_path, train=make_rows(4), bf16=bf16, max_steps=2)
    trainer.train()
    dtypes = {parameter.requires_grad: set() for parameter in model.parameters()}
    for parameter in model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    expected = {True: {torch.float32}, False: {torch.bfloat16 if bf16 else torch.float32}}
    assert dtypes == {trained: expected[trained] for trained in dtypes}
    assert (False in dtypes) == (method != "full")


def test_the_frozen_layers_of_a_whole_model_stay_as_they_are_under_bf16(tmp_path):
    """A full run is saved whole: what it did not train must come out bit for bit, not rounded."""
    model = full.adapt(make_model("llama", "full"), TASK, full.MethodArguments(train_top_layers=1), None)[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(model, tmp_path, train=make_rows(4), bf16=True, max_steps=2)
    trainer.train()
    trainer.save_model()
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(torch.equal(saved[name], before[name]) for name in frozen)


def test_flex_attention_is_refused_where_it_cannot_train(tmp_path):
    shared = args.SharedArguments(attention="flex_attention")
    with pytest.raises(UserError, match="--attention flex_attention .* CPU.* leave the flag out"):
        trainer.prepare(make_model("llama", "lora"), TrainingArguments(str(tmp_path), use_cpu=True), shared)


@pytest.mark.parametrize("kind, installed, bf16, suits", [("llama", True, True, True), ("llama", False, True, False),
                                                          ("llama", True, False, False), ("t5", True, True, False)])
def test_flash_attention_is_taken_where_it_can_be(kind, installed, bf16, suits, monkeypatch):
    monkeypatch.setattr(trainer, "is_flash_attn_2_available", lambda: installed)
    gpu = SimpleNamespace(device=torch.device("cuda"), bf16=bf16, fp16=False)
    model = make_model(kind, "full") if kind == "llama" else T5ForConditionalGeneration(T5Config(
        vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert trainer._flash_attention_suits(model, gpu) == suits
    assert not trainer._flash_attention_suits(model, SimpleNamespace(device=torch.device("cpu"), bf16=bf16, fp16=False))
