"""What each recipe trains, leaves alone, saves and loads, on tiny GPT-2 and Llama models; each run goes through the recipe's own main()."""

import gc
import importlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DIALOGUES
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig, set_seed

from recipes import adalora, adapter, full, lora, prefix
from recipes.common import args, generation, models, runs, tasks
from recipes.common import trainer as trainer_module
from recipes.common.chat import prompt
from recipes.common.errors import UserError
from recipes.common.trainer import RecipeTrainer

gc.freeze()  # every Trainer collects garbage; looking through all of the imported libraries takes longer than these trainings

KINDS = ("gpt2", "llama")
# Recipe and flags of every variant that trains something different.
VARIANTS = {
    "lora": ("lora",),
    "lora-dora": ("lora", "--use_dora"),
    "lora-rslora": ("lora", "--use_rslora"),
    "adalora": ("adalora", "--init_rank", "8", "--target_rank", "6", "--every", "1"),
    "prefix": ("prefix",),
    "prefix-projection": ("prefix", "--prefix_projection", "--projection_hidden_size", "24"),
    "adapter": ("adapter",),
    "adapter-pfeiffer": ("adapter", "--placement", "pfeiffer"),
    "full": ("full",),
    "full-top": ("full", "--train_top_layers", "1"),
}
WIDTH, LAYERS, RANK, TOKENS, BOTTLENECK, PROJECTION = 32, 2, 8, 100, 32, 24
# (inputs, outputs) of every linear layer of a block; Llama's k and v have half the heads.
LINEAR = {"gpt2": [(32, 96), (32, 32), (32, 128), (128, 32)],
          "llama": [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]}
KV_WIDTH = {"gpt2": 32, "llama": 16}
# Names of the parameters that belong to a method, as whole-name patterns.
OWN = {
    "lora": {kind: r".*\.lora_[AB]\.default\.weight" for kind in KINDS},
    "lora-dora": {kind: r".*\.lora_([AB]\.default|magnitude_vector\.default)\.weight" for kind in KINDS},
    "adalora": {kind: r".*\.lora_[ABE]\.default" for kind in KINDS},
    "prefix": {kind: r"prompt_encoder\.default\..*" for kind in KINDS},
    "adapter": {kind: r".*\.bottleneck_(down|up)\.default\.(weight|bias)" for kind in KINDS},
    "full": {kind: ".*" for kind in KINDS},
    "full-top": {"gpt2": r"transformer\.(h\.1\..*|ln_f\..*|wte\.weight)",
                 "llama": r"model\.(layers\.1\..*|norm\.weight|embed_tokens\.weight)"},
}


def run_recipe(recipe, model, data, output, *flags, trainer_class=RecipeTrainer):
    """Call the recipe's main() as its command line would, in fp32 on the CPU; returns its Trainer."""
    module, seen, finish = importlib.import_module(f"recipes.{recipe}"), [], runs.finish

    def keep_trainer(trainer, *rest):
        seen.append(trainer)
        finish(trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "finish", keep_trainer)
        patch.setattr(trainer_module, "RecipeTrainer", trainer_class)
        patch.setattr(sys, "argv", [f"recipes/{recipe}.py", "--model", str(model), "--data", str(data), "--output_dir", str(output),
                                    "--max_length", "150", "--use_cpu", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True",
                                    *flags])
        module.main()
    return seen[0]


class Watched(RecipeTrainer):
    """Keeps a copy of all parameters from before the first step."""

    def train(self, *args, **kwargs):
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return super().train(*args, **kwargs)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in DIALOGUES)
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(tiny, data, tmp_path_factory):
    """finished("lora", "gpt2") -> (run folder, Trainer) after 3 optimizer steps of this variant."""
    made = {}

    def make(variant, kind):
        if (variant, kind) not in made:
            recipe, *flags = VARIANTS[variant]
            folder = tmp_path_factory.mktemp("runs") / f"{variant}-{kind}"
            trainer = run_recipe(recipe, tiny(kind), data, folder, *flags, "--max_steps", "3", "--per_device_train_batch_size", "4",
                                 "--learning_rate", "0.05", "--warmup_steps", "0", "--lr_scheduler_type", "constant",
                                 "--load_best_model_at_end", "False", trainer_class=Watched)
            trainer.model.eval()
            made[variant, kind] = folder, trainer
        return made[variant, kind]

    return make


def base(tiny, kind):
    return AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()


def logits(model):
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.set_attn_implementation("eager")  # the Trainer may have left another kernel, which rounds differently
    ids = torch.arange(40).reshape(2, 20) * 7 % 300
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def reply(model, tokenizer):
    prompts = [prompt(row["messages"][:-1], tokenizer, 160) for row in DIALOGUES]
    return generation.replies(model, tokenizer, prompts, max_new_tokens=12)


def stub_task(max_length=160):
    return SimpleNamespace(peft_type="CAUSAL_LM", new_modules=lambda: None, window=256, max_length=max_length, method_report={},
                           steps=None, train=[{"input_ids": [5, 6, 7]}])


def closed_formula(variant, kind):
    """Trained parameters of a variant with the recipe's defaults, from the sizes in conftest.tiny_config."""
    kv, total = KV_WIDTH[kind], 2 * LAYERS * KV_WIDTH[kind]
    if variant.startswith("lora"):  # DoRA's lengths: one an output
        return LAYERS * sum(RANK * (inputs + outputs) + (outputs if "dora" in variant else 0) for inputs, outputs in LINEAR[kind])
    if variant == "adalora":  # and the singular values
        return LAYERS * sum(RANK * (inputs + outputs + 1) for inputs, outputs in LINEAR[kind])
    if variant == "prefix":
        return TOKENS * total
    if variant == "prefix-projection":
        return TOKENS * kv + (kv * PROJECTION + PROJECTION) + (PROJECTION * total + total)
    if variant.startswith("adapter"):
        return LAYERS * (1 if "pfeiffer" in variant else 2) * (2 * WIDTH * BOTTLENECK + BOTTLENECK + WIDTH)
    biases = {"gpt2": sum(outputs for _, outputs in LINEAR[kind]) + 2 * WIDTH, "llama": 0}[kind]  # of the matrices and the two norms
    block, norm = sum(i * o for i, o in LINEAR[kind]) + 2 * WIDTH + biases, {"gpt2": 2 * WIDTH, "llama": WIDTH}[kind]
    embedding, positions = 400 * WIDTH, {"gpt2": 256 * WIDTH, "llama": 0}[kind]  # the head is the embedding
    return embedding + norm + (block if variant == "full-top" else LAYERS * block + positions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_method_s_parameters_change(variant, kind, finished, tiny):
    _, trainer = finished(variant, kind)
    own = re.compile((OWN.get(variant) or OWN[variant.split("-")[0]])[kind])
    after = dict(trainer.model.named_parameters())
    changed = {name for name, p in after.items() if not torch.equal(p, trainer.before[name])}
    changed |= {name for name, p in after.items() if name.endswith(".lora_E.default") and not p.any()}  # grown, then taken away again
    assert changed == {name for name in after if own.fullmatch(name)} == {name for name, p in after.items() if p.requires_grad}

    inner = trainer.model if variant.startswith("full") else trainer.model.get_base_model()
    shipped = dict(base(tiny, kind).named_parameters())
    frozen = {name.replace(".base_layer", ""): p for name, p in inner.named_parameters() if not p.requires_grad and "ranknum" not in name}
    assert all(torch.equal(p, shipped[name]) for name, p in frozen.items())
    if not variant.startswith("full"):
        assert frozen.keys() == shipped.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_trainable_count_is_the_closed_formula(variant, kind, finished, tiny):
    folder, trainer = finished(variant, kind)
    expected = closed_formula(variant, kind)
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == expected
    record = models.read_record(folder)
    assert record["trainable_parameters"] == expected
    added = 0 if variant.startswith("full") else expected
    if variant == "adalora":  # PEFT keeps the rank that each matrix began with, a frozen number
        added += LAYERS * len(LINEAR[kind])
    assert record["total_parameters"] == sum(p.numel() for p in base(tiny, kind).parameters()) + added


@pytest.mark.parametrize("kind", [*KINDS, "qwen3"])
@pytest.mark.parametrize(("recipe", "flags"), [(lora, {}), (lora, {"use_dora": True}), (lora, {"use_rslora": True}), (adapter, {}),
                                               (adalora, {})])
def test_a_new_lora_or_adapter_is_the_identity(recipe, flags, kind, tiny):
    expected = logits(base(tiny, kind))
    set_seed(1)
    model, _ = recipe.adapt(base(tiny, kind), stub_task(), recipe.MethodArguments(**flags), SimpleNamespace(max_steps=10, process_index=0))
    assert torch.equal(logits(model.eval()), expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(start in name for start in (("lora_E",) if recipe is adalora else ("lora_B", "bottleneck_up"))):
                parameter.add_(1e-3)
    assert not torch.equal(logits(model), expected)  # the comparison sees the smallest start that is none


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_run_answers_like_the_trained_model(variant, kind, finished, tiny):
    folder, trainer = finished(variant, kind)
    loaded, tokenizer = models.load_run(folder), models.load_run_tokenizer(folder)
    assert_same(variant, logits(loaded), logits(trainer.model))
    assert reply(loaded, tokenizer) == reply(trainer.model, trainer.processing_class)
    assert not torch.allclose(logits(loaded), logits(base(tiny, kind)), atol=1e-2)
    untuned = models.load_base(folder)
    assert torch.equal(logits(untuned), logits(base(tiny, kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_libraries_own_loaders_read_a_run(variant, kind, finished, tiny):
    folder, trainer = finished(variant, kind)
    expected = logits(trainer.model)
    if variant.startswith("full"):
        loaded = [AutoModelForCausalLM.from_pretrained(folder)]
        assert not (folder / "adapter_config.json").exists()
    else:
        loaded = [PeftModel.from_pretrained(base(tiny, kind), folder), AutoPeftModelForCausalLM.from_pretrained(folder)]
        assert not (folder / "config.json").exists()
    for model in loaded:
        assert_same(variant, logits(model.eval()), expected)
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(DIALOGUES[0]["messages"], tokenize=False)
    assert rendered == trainer.processing_class.apply_chat_template(DIALOGUES[0]["messages"], tokenize=False)


def assert_same(variant, got, expected):
    """Bit for bit; but PEFT saves what a projection amounts to, computed once rather than for each row of the batch, and AdaLoRA's matrices
    without the rows taken away; and its own forward rounds a scale that is no power of two elsewhere than the fused one."""
    if variant in ("prefix-projection", "lora-rslora", "adalora"):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.startswith("full")])
def test_disable_adapter_gives_the_base_model(variant, kind, finished, tiny):
    _, trainer = finished(variant, kind)
    tuned = logits(trainer.model)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(base(tiny, kind)))
    assert torch.equal(logits(trainer.model), tuned)


@pytest.mark.parametrize("flag", ["--activation_checkpointing", "--gradient_checkpointing"])
def test_prefix_refuses_activation_checkpointing_when_arguments_are_parsed(flag, tmp_path):
    argv = ["--use_cpu", "--bf16", "False", "--output_dir", str(tmp_path / "run"), flag]
    with pytest.raises(UserError, match="activation_checkpointing"):
        args.parse(prefix.__doc__, prefix.MethodArguments, argv)
    for recipe in (lora, adapter, full):
        args.parse(recipe.__doc__, recipe.MethodArguments, argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_starts_as_real_tokens(kind, projection, tiny):
    """Untrained, it acts on a dialogue as the first train tokens before it would; a random one does not."""
    task, ids = stub_task(), torch.arange(12).reshape(1, 12) + 40
    task.train = [{"input_ids": [50, 60, 70]}, {"input_ids": [80, 90]}]
    before = torch.tensor([[50, 60, 70, 80, 90, 50, 60, 70]])  # the rows once more, as they hold too few tokens
    with torch.no_grad():
        expected = base(tiny, kind)(input_ids=torch.cat([before, ids], 1)).logits[:, 8:]
        for start in ("text", "random"):
            method = prefix.MethodArguments(num_virtual_tokens=8, prefix_projection=projection, projection_hidden_size=24, start=start)
            model = prefix.adapt(base(tiny, kind), task, method, None)[0].eval()
            got = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            assert torch.allclose(got, expected, atol=1e-4) == (start == "text")


@torch.no_grad()
def test_the_prefix_of_an_encoder_starts_as_real_tokens(tiny, capsys):
    """Its keys and values are those which the layers compute of the first train tokens."""
    before = [50, 60, 70, 80, 90, 50, 60, 70]
    model = AutoModelForSequenceClassification.from_pretrained(tiny("bert"), num_labels=3).eval()
    hidden = model.bert(torch.tensor([before]), output_hidden_states=True).hidden_states
    attention = [layer.attention.self for layer in model.bert.encoder.layer]
    expected = [(own.key(states), own.value(states)) for own, states in zip(attention, hidden, strict=False)]
    task = stub_task()
    task.peft_type, task.new_modules, task.train = "SEQ_CLS", lambda: ["classifier"], [{"input_ids": before}]
    prompt = prefix.adapt(model, task, prefix.MethodArguments(num_virtual_tokens=8), None)[0].get_prompt(1)
    for layer, pair in zip(prompt.layers, expected, strict=True):
        for got, wanted in zip((layer.keys, layer.values), pair, strict=True):
            assert torch.allclose(got.transpose(1, 2).flatten(2), wanted, atol=1e-6)
    assert "at random" not in capsys.readouterr().out


def test_a_model_that_takes_no_prefix_is_refused():
    model = AutoModelForSequenceClassification.from_config(DistilBertConfig(vocab_size=100, dim=8, n_layers=1, n_heads=2, hidden_dim=8))
    with pytest.raises(UserError, match="distilbert models take no keys and values .* use --recipe lora"):
        prefix.adapt(model, stub_task(), prefix.MethodArguments(), None)


def test_by_default_rows_leave_a_prefix_its_room(tiny, data, tmp_path, monkeypatch):
    """The task's longest row, 768 tokens, would fill the model's window of 256."""
    monkeypatch.setattr(sys, "argv", ["recipes/prefix.py", "--model", str(tiny("gpt2")), "--data", str(data), "--output_dir",
                                      str(tmp_path / "run"), "--use_cpu", "--bf16", "False", "--report_to", "none", "--max_steps", "1"])
    prefix.main()
    assert json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["shared_arguments"]["max_length"] == 256 - 100


def test_a_prefix_needs_room_in_the_window(tiny, data, tmp_path):
    method = prefix.MethodArguments(num_virtual_tokens=20)
    prefix.adapt(base(tiny, "gpt2"), stub_task(max_length=236), method, None)
    with pytest.raises(UserError, match="--max_length 237 and --num_virtual_tokens 20"):
        prefix.adapt(base(tiny, "gpt2"), stub_task(max_length=237), method, None)
    with pytest.raises(UserError, match="lower one of them"):
        run_recipe("prefix", tiny("gpt2"), data, tmp_path / "run", "--max_length", "250")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("recipe", "flags", "message"), [
    (prefix, ["--num_virtual_tokens", "0"], "--num_virtual_tokens: '0'"),
    (full, ["--train_top_layers", "0"], "--train_top_layers: '0'"),
])
def test_a_setting_that_trains_nothing_is_refused(recipe, flags, message):
    with pytest.raises(UserError, match=message):
        args.parse(recipe.__doc__, recipe.MethodArguments, ["--use_cpu", "--bf16", "False", *flags])


def test_more_top_layers_than_the_model_has_are_refused(tiny):
    with pytest.raises(UserError, match="the model has 2 blocks"):
        full.adapt(base(tiny, "llama"), stub_task(), full.MethodArguments(train_top_layers=3), None)


def test_lora_trains_only_the_matrices_asked_for(tiny):
    model, _ = lora.adapt(base(tiny, "llama"), stub_task(), lora.MethodArguments(target_modules="q_proj,v_proj", rank=4), None)
    names = {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "v_proj"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == LAYERS * 4 * (32 + 32 + 32 + 16)


def test_rslora_scales_by_the_root_of_the_rank(tiny):
    scales = {}
    for name in ("use_dora", "use_rslora"):
        model, _ = lora.adapt(base(tiny, "llama"), stub_task(), lora.MethodArguments(rank=4, alpha=6, **{name: True}), None)
        scales[name] = {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}
    assert scales == {"use_dora": {1.5}, "use_rslora": {3.0}}


def test_4_bits_are_refused_when_arguments_are_parsed(tmp_path, monkeypatch):
    argv = ["--use_cpu", "--bf16", "False", "--output_dir", str(tmp_path / "run"), "--load_in_4bit"]
    with pytest.raises(UserError, match="--load_in_4bit needs an NVIDIA GPU, and this run is on cpu: leave it out"):
        args.parse(lora.__doc__, lora.MethodArguments, argv)
    for recipe in (adapter, full, prefix):
        with pytest.raises(UserError, match="unknown flag --load_in_4bit"):
            args.parse(recipe.__doc__, recipe.MethodArguments, argv)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes==0"):
        models.check_4bit(torch.device("cuda"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("peft_type", "kept"), [("CAUSAL_LM", None), ("SEQ_CLS", {"classifier", "score", "pooler"})])
def test_the_config_of_4_bits_is_qlora_s_and_reaches_the_loading(peft_type, kept, tiny, monkeypatch):
    """No GPU here: this is what the model's loader is told, and no more."""
    seen = {}
    monkeypatch.setattr(models, "load", lambda source, auto_class, **config: seen.update(config) or SimpleNamespace(drawn_at_random=[]))
    task = tasks.Task("x", peft_type, AutoModelForCausalLM, None, None, 8, None, None, None, config={"pad_token_id": 3})
    task.load_model()
    assert seen == {"pad_token_id": 3, "completed": False}
    task.load_model(True)
    config = seen["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype in (torch.bfloat16, torch.float16)
    assert config.llm_int8_skip_modules is None if kept is None else kept <= set(config.llm_int8_skip_modules)


def test_numbers_packed_in_4_bits_are_counted_as_the_model_s():
    packed = type("Params4bit", (), {"numel": lambda self: 300, "quant_state": SimpleNamespace(shape=torch.Size([20, 30]))})()
    assert runs.numbers_in(packed) == 600 and runs.numbers_in(torch.zeros(20, 30)) == 600
