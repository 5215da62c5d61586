"""recipes.common.bottleneck on tiny models of every family, built here from their configs; nothing is downloaded."""
import copy
import importlib
import json
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from recipes.common import bottleneck
from recipes.common.bottleneck import PLACEMENTS, BottleneckConfig, BottleneckLayer

LAYERS, HIDDEN, SIZE, VOCABULARY = 2, 16, 3, 50
_HEADS = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": 32, "num_attention_heads": 4}
_GROUPED = dict(**_HEADS, num_key_value_heads=2, head_dim=8)  # heads 4 x 8 = 32 wide, so o_proj is not square
_ENDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CAUSAL = {
    "gpt2": dict(n_layer=LAYERS, n_embd=HIDDEN, n_head=4, **_ENDS),
    "llama": dict(**_GROUPED, **_ENDS),
    "qwen3": dict(**_GROUPED, **_ENDS),
    "gemma3_text": dict(**_GROUPED, **_ENDS, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
}
CLASSIFIER = {"bert": dict(**_HEADS, **_ENDS, num_labels=3)}
SEQ2SEQ = {
    "t5": dict(num_layers=LAYERS, d_model=HIDDEN, d_ff=32, d_kv=8, num_heads=4, decoder_start_token_id=0, **_ENDS),
    "marian": dict(encoder_layers=LAYERS, decoder_layers=LAYERS, d_model=HIDDEN, encoder_ffn_dim=32, decoder_ffn_dim=32,
                   encoder_attention_heads=4, decoder_attention_heads=4, decoder_start_token_id=0, **_ENDS),
}
ALL = [*CAUSAL, *CLASSIFIER, *SEQ2SEQ]
DECODERS = [*CAUSAL, *SEQ2SEQ]

# Every wrapped module by its full name: (attention projections, feed-forward projections).
WRAPPED = {
    "gpt2": (["transformer.h.{}.attn.c_proj"], ["transformer.h.{}.mlp.c_proj"]),
    "llama": (["model.layers.{}.self_attn.o_proj"], ["model.layers.{}.mlp.down_proj"]),
    "qwen3": (["model.layers.{}.self_attn.o_proj"], ["model.layers.{}.mlp.down_proj"]),
    "gemma3_text": (["model.layers.{}.self_attn.o_proj"], ["model.layers.{}.mlp.down_proj"]),
    "bert": (["bert.encoder.layer.{}.attention.output.dense"], ["bert.encoder.layer.{}.output.dense"]),
    "t5": (["encoder.block.{}.layer.0.SelfAttention.o", "decoder.block.{}.layer.0.SelfAttention.o"],
           ["encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"]),
    "marian": (["model.encoder.layers.{}.self_attn.out_proj", "model.decoder.layers.{}.self_attn.out_proj"],
               ["model.encoder.layers.{}.fc2", "model.decoder.layers.{}.fc2"]),
}


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def base_model(model_type, **overrides):
    """A tiny model with its task's head, always the same weights; evaluation mode, so no dropout."""
    torch.manual_seed(1)
    auto = {**dict.fromkeys(CAUSAL, AutoModelForCausalLM), **dict.fromkeys(SEQ2SEQ, AutoModelForSeq2SeqLM),
            **dict.fromkeys(CLASSIFIER, AutoModelForSequenceClassification)}[model_type]
    settings = {**CAUSAL, **CLASSIFIER, **SEQ2SEQ}[model_type]
    config = AutoConfig.for_model(model_type, **settings)
    return auto.from_config(config, **overrides).eval()


def task_type(model_type):
    return "CAUSAL_LM" if model_type in CAUSAL else "SEQ_CLS" if model_type in CLASSIFIER else "SEQ_2_SEQ_LM"


def adapted(model_type, model=None, **settings):
    settings = {"bottleneck_size": SIZE, "task_type": task_type(model_type), **settings}
    return get_peft_model(model or base_model(model_type), BottleneckConfig(**settings)).eval()


def batch(model_type):
    """Two rows of seven tokens with labels."""
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 2]) if model_type in CLASSIFIER else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@torch.no_grad()
def logits(model, model_type):
    return model(**batch(model_type)).logits


def disturb(model):
    """Make every trainable weight differ from its start, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def assert_identity(model, model_type):
    assert torch.equal(logits(model, model_type), logits(base_model(model_type), model_type))


# --- where, how many, and the identity at start


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("model_type", ALL)
def test_wraps_exactly_the_named_projections(model_type, placement):
    model = adapted(model_type, placement=placement)
    attention, feed_forward = WRAPPED[model_type]
    names = feed_forward if placement == "pfeiffer" else attention + feed_forward
    found = {name for name, module in model.get_base_model().named_modules() if isinstance(module, BottleneckLayer)}
    assert found == {name.format(layer) for name in names for layer in range(LAYERS)}
    assert set(model.targeted_module_names) == found


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("model_type", ALL)
def test_starts_as_the_identity_with_the_closed_parameter_count(model_type, placement):
    model = adapted(model_type, placement=placement)
    assert_identity(model, model_type)

    stacks = 2 if model_type in SEQ2SEQ else 1
    adapters = LAYERS * stacks * (2 if placement == "houlsby" else 1)
    head = HIDDEN * 3 + 3 if model_type in CLASSIFIER else 0  # the classifier is trained in full
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == adapters * (2 * HIDDEN * SIZE + SIZE + HIDDEN) + head


def test_identity_check_catches_an_up_projection_that_is_not_zero():
    model = adapted("gpt2")
    layer = model.get_submodule("base_model.model.transformer.h.0.attn.c_proj")
    torch.nn.init.normal_(layer.bottleneck_up["default"].weight)
    with pytest.raises(AssertionError):
        assert_identity(model, "gpt2")


@pytest.mark.parametrize("model_type", PLACEMENTS)
def test_every_model_type_of_the_table_gets_its_adapters(model_type):
    config = AutoConfig.for_model(model_type)
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if getattr(config, name, None) is not None:
            setattr(config, name, LAYERS)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:LAYERS]
    with torch.device("meta"):  # real sizes, no memory
        bare, same = AutoModel.from_config(config), AutoModel.from_config(config)
    stacks = 2 if config.is_encoder_decoder else 1
    for model, placement, per_layer in ((bare, "houlsby", 2), (same, "pfeiffer", 1)):
        model = get_peft_model(model, BottleneckConfig(placement=placement))
        assert len(model.targeted_module_names) == per_layer * LAYERS * stacks, model.targeted_module_names
        hidden = {m.bottleneck_up["default"].out_features for m in model.modules() if isinstance(m, BottleneckLayer)}
        assert hidden == {config.hidden_size}


def test_bart_classifier_is_not_taken_for_an_attention_projection():
    config = AutoConfig.for_model("bart", **SEQ2SEQ["marian"], num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    model = get_peft_model(model, BottleneckConfig(modules_to_save=["classification_head"]))
    assert not isinstance(model.get_submodule("base_model.model.classification_head.original_module.out_proj"),
                          BottleneckLayer)
    assert len(model.targeted_module_names) == 4 * LAYERS


def test_target_modules_replace_the_placement():
    model = adapted("llama", target_modules=["down_proj"])
    assert sorted(model.targeted_module_names) == [f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)]


# --- the arithmetic


def test_forward_follows_the_formula():
    model = disturb(adapted("llama", activation="tanh"))
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    x = torch.randn(2, 5, 32)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    y = x @ layer.base_layer.weight.T
    expected = y + torch.tanh(y @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(layer(x), expected)


def test_dropout_acts_in_training_only():
    model = disturb(adapted("llama", dropout=0.5))
    assert torch.equal(logits(model, "llama"), logits(model, "llama"))
    model.train()
    assert not torch.equal(logits(model, "llama"), logits(model, "llama"))


# --- training


@pytest.mark.parametrize("model_type", ALL)
def test_only_adapters_and_modules_to_save_change(model_type):
    model = adapted(model_type).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):  # two: `down` has no gradient until `up` has left zero
        model(**batch(model_type)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    may_change = ("bottleneck_down.default", "bottleneck_up.default", "modules_to_save.default")
    for name, parameter in model.named_parameters():
        trained = any(part in name for part in may_change)
        assert parameter.requires_grad == trained, name
        assert torch.equal(parameter, before[name]) != trained, name


def test_layer_norms_can_be_trained_along_as_in_the_paper(tmp_path):
    model = adapted("bert", modules_to_save=["LayerNorm"])
    assert_identity(model, "bert")
    adapters, head, norms = 2 * LAYERS, HIDDEN * 3 + 3, (2 * LAYERS + 1) * 2 * HIDDEN
    assert model.get_nb_trainable_parameters()[0] == adapters * (2 * HIDDEN * SIZE + SIZE + HIDDEN) + head + norms
    disturb(model).save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("bert"), tmp_path).eval(), "bert"),
                       logits(model, "bert"))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "t5"])
def test_activation_checkpointing_gives_the_same_gradients(model_type, use_reentrant):
    def gradients(checkpointing):
        torch.manual_seed(3)
        model = disturb(adapted(model_type))
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        torch.manual_seed(4)  # the base model's own dropout
        model(**batch(model_type)).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7, msg=name)


def test_bf16_base_with_fp32_adapter_under_autocast_and_all_bf16():
    for autocast_adapter_dtype, expected in ((True, torch.float32), (False, torch.bfloat16)):
        base = base_model("llama", dtype=torch.bfloat16)
        start = logits(base, "llama")
        config = BottleneckConfig(bottleneck_size=SIZE, task_type="CAUSAL_LM")
        model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
        assert torch.equal(logits(model, "llama"), start)  # without autocast as well
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast_adapter_dtype):
            loss = model(**batch("llama")).loss
        loss.backward()
        up = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").bottleneck_up["default"]
        assert up.weight.grad.dtype == expected and up.weight.grad.abs().sum() > 0


def test_trainer_resumes_exactly(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCABULARY, (8, 7))]

    def train(folder, resume=None):
        torch.manual_seed(5)
        arguments = TrainingArguments(folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
                                      learning_rate=1e-2, disable_tqdm=True)
        trainer = Trainer(model=adapted("llama"), args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return logits(trainer.model.eval(), "llama")

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(resumed, whole)
    assert not torch.equal(whole, logits(base_model("llama"), "llama"))


# --- saving, switching, generating


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("model_type", ALL)
def test_save_and_load_give_the_same_logits(model_type, low_cpu_mem_usage, tmp_path):
    model = disturb(adapted(model_type, placement="pfeiffer", activation="relu"))
    model.save_pretrained(tmp_path)
    torch.manual_seed(6)
    loaded = PeftModel.from_pretrained(base_model(model_type), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded, model_type), logits(model, model_type))
    assert not torch.equal(logits(loaded, model_type), logits(base_model(model_type), model_type))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert isinstance(PeftConfig.from_pretrained(tmp_path), BottleneckConfig)


def test_saved_adapter_is_small_and_names_no_adapter(tmp_path):
    from safetensors import safe_open
    adapted("gpt2").save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert len(keys) == 2 * LAYERS * 4
    assert "base_model.model.transformer.h.0.attn.c_proj.bottleneck_down.weight" in keys
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"


def test_loaded_adapter_can_be_trained_further_under_any_name(tmp_path):
    model = disturb(adapted("gpt2"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("gpt2"), tmp_path, adapter_name="other", is_trainable=True).eval()
    assert torch.equal(logits(loaded, "gpt2"), logits(model, "gpt2"))
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


@pytest.mark.parametrize("model_type", ALL)
def test_disable_adapter_and_unload_give_the_base_logits(model_type):
    model = disturb(adapted(model_type))
    changed = logits(model, model_type)
    with model.disable_adapter():
        assert_identity(model, model_type)
    assert torch.equal(logits(model, model_type), changed)
    if model_type not in CLASSIFIER:  # PEFT keeps the trained head when it unloads
        assert_identity(model.unload(), model_type)


def test_two_adapters_switch():
    model = disturb(adapted("llama"))
    first = logits(model, "llama")
    model.add_adapter("second", BottleneckConfig(bottleneck_size=5, placement="pfeiffer", task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, "llama"), first)
    model.set_adapter("second")
    assert_identity(model, "llama")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".second." in name for name in trainable)
    second = logits(disturb(model), "llama")
    model.set_adapter("default")
    assert torch.equal(logits(model, "llama"), first)
    model.set_adapter("second")  # PEFT loses track when an adapter that covers more modules is deleted while active
    model.delete_adapter("default")
    assert not any("default" in name for name, _ in model.named_modules())
    assert torch.equal(logits(model, "llama"), second)


@pytest.mark.parametrize("model_type", DECODERS)
def test_generates_the_same_with_and_without_cache(model_type):
    model = disturb(adapted(model_type))
    prompt = {key: value for key, value in batch(model_type).items() if key != "labels"}

    def generate(**settings):
        return model.generate(**prompt, do_sample=False, min_new_tokens=6, max_new_tokens=6, **settings)

    cached = generate(use_cache=True)
    assert torch.equal(cached, generate(use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, generate())


# --- what must be refused


def test_merging_is_refused_and_leaves_the_model_alone():
    model = disturb(adapted("llama"))
    before = logits(model, "llama")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge):
        with pytest.raises(ValueError, match="non-linear and cannot be merged"):
            merge()
    assert torch.equal(logits(model, "llama"), before)


def test_unknown_model_type_is_refused_and_target_modules_mend_it():
    config = AutoConfig.for_model("bloom", n_layer=LAYERS, hidden_size=HIDDEN, n_head=4, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="'bloom': pass target_modules"):
        get_peft_model(AutoModelForCausalLM.from_config(config), BottleneckConfig())
    model = get_peft_model(AutoModelForCausalLM.from_config(config),
                           BottleneckConfig(target_modules=["self_attention.dense", "dense_4h_to_h"]))
    assert len(model.targeted_module_names) == 2 * LAYERS


@pytest.mark.parametrize("wrong, message", [
    ({"placement": "parallel"}, "houlsby"), ({"activation": "gelo"}, "gelu"), ({"bottleneck_size": 0}, "at least 1"),
])
def test_config_refuses_what_it_does_not_know(wrong, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**wrong)


def test_target_that_is_no_projection_is_refused():
    with pytest.raises(TypeError, match=r"model\.embed_tokens.*Embedding"):
        adapted("llama", target_modules=["embed_tokens"])


# --- registration


def test_registration_survives_reload(tmp_path):
    adapted("gpt2").save_pretrained(tmp_path)
    members, before = list(PeftType), dict(vars(bottleneck))
    assert members.count("BOTTLENECK") == 1
    try:
        importlib.reload(bottleneck)
        assert list(PeftType) == members
        assert type(PeftConfig.from_pretrained(tmp_path)) is bottleneck.BottleneckConfig is not BottleneckConfig
        PeftModel.from_pretrained(base_model("gpt2"), tmp_path)
    finally:  # the other tests hold the classes from before the reload
        vars(bottleneck).update(before)
        bottleneck._register()
    assert type(PeftConfig.from_pretrained(tmp_path)) is BottleneckConfig


def test_the_new_member_behaves_like_any_other():
    member = PeftType.BOTTLENECK
    assert member is PeftType("BOTTLENECK") is PeftType["BOTTLENECK"] is copy.deepcopy(member)
    assert pickle.loads(pickle.dumps(member)) is member
    assert isinstance(member, PeftType) and member == "BOTTLENECK" and member.value == "BOTTLENECK"
