"""Houlsby and Pfeiffer bottleneck adapters as a PEFT method; PEFT itself ships none.

    model = get_peft_model(model, BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=64))

An adapter maps the output y of a sub-layer, before the residual sum, to

    y + up(dropout(activation(down(y))))        down: hidden -> bottleneck_size, up: bottleneck_size -> hidden

`houlsby` puts one after the attention and one after the feed-forward output projection (Houlsby et al., 2019,
arXiv:1902.00751), `pfeiffer` only one after the feed-forward (Pfeiffer et al., 2021, arXiv:2005.00247). With hidden
size h and bottleneck size b each adds 2·h·b + b + h parameters. `up` starts at zero, so a new adapter is the identity.

Where this differs from the papers: the adapter sits directly behind the projection, so ahead of the sub-layer's
dropout and, on Gemma 2 and 3, ahead of the norm that follows the projection; Pfeiffer's rearranged residual around the
last norm of a BERT layer is left out; the layer norms stay frozen unless `modules_to_save` names them (Houlsby et al.
train them); in encoder-decoders the cross-attention carries no adapter.

Importing this module registers the method, and an adapter saved to disk loads only after that import.
"""
from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import nn
from transformers.pytorch_utils import Conv1D

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}

_LLAMA = (r"self_attn\.o_proj", r"mlp\.down_proj")
_BERT = (r"layer\.\d+\.attention\.output\.dense", r"layer\.\d+\.output\.dense")
_BART = (r"self_attn\.out_proj", r"layers\.\d+\.fc2")
_T5 = (r"SelfAttention\.o", r"DenseReluDense\.wo")

# Model type -> how the full name of its attention and of its feed-forward output projection ends (regular expressions).
# Suffix lists as LoRA uses them would not do: BERT's `output.dense` ends both names, `out_proj` BART's classifier too.
PLACEMENTS = {
    "gpt2": (r"attn\.c_proj", r"mlp\.c_proj"),
    "gpt_neox": (r"attention\.dense", r"mlp\.dense_4h_to_h"),
    "distilbert": (r"attention\.out_lin", r"ffn\.lin2"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _LLAMA),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"), _BERT),
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "m2m_100", "opt"), _BART),
    **dict.fromkeys(("t5", "mt5"), _T5),
}


@dataclass
class BottleneckConfig(PeftConfig):
    """What to insert and where.

    A list in `target_modules` matches name endings, a string is a regular expression for whole names, as in LoraConfig;
    either replaces `placement`. None looks the names up in PLACEMENTS by the model's type.

    Raises ValueError for an unknown `placement` or `activation` and for a `bottleneck_size` below 1.
    """

    bottleneck_size: int = field(default=64, metadata={"help": "hidden units b of each adapter"})
    placement: str = field(default="houlsby", metadata={"help": "houlsby (two a layer) or pfeiffer (one)"})
    activation: str = field(default="gelu", metadata={"help": f"one of {', '.join(ACTIVATIONS)}"})
    dropout: float = field(default=0.0, metadata={"help": "dropout probability after the activation"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "projections to wrap"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved in full"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.BOTTLENECK
        if self.placement not in ("houlsby", "pfeiffer"):
            raise ValueError(f"placement must be 'houlsby' or 'pfeiffer', not {self.placement!r}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}.")
        if self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size must be at least 1, not {self.bottleneck_size}.")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A projection (nn.Linear or Conv1D) followed by its adapters, of which several active ones run in sequence.

    Input (..., in_features), output (..., hidden), in the dtype of the projection's output.
    """

    # Each entry is a bare nn.Linear: PEFT takes the adapter's name out of `bottleneck_up.default.weight` when it saves,
    # but would leave it in a deeper key such as `bottleneck.default.up.weight`.
    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_activation",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_activation = nn.ModuleDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add the adapter `adapter_name`, initialised to the identity; PEFT decides afterwards what is trainable."""
        projection = self.get_base_layer()
        hidden = projection.nf if isinstance(projection, Conv1D) else projection.out_features
        down, up = nn.Linear(hidden, config.bottleneck_size), nn.Linear(config.bottleneck_size, hidden)
        # Zero in `up` alone makes the identity; zero in `down` too would leave both matrices without a gradient.
        # nn.Linear has already drawn `down.weight` (Kaiming uniform).
        for parameter in (down.bias, up.weight, up.bias):
            nn.init.zeros_(parameter)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.bottleneck_activation[adapter_name] = nn.Sequential(ACTIVATIONS[config.activation](),
                                                                 nn.Dropout(config.dropout))
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                # The base may be bf16 while the adapter is fp32; the sum keeps the dtype that the base model expects.
                update = up(self.bottleneck_activation[name](down(self._cast_input_dtype(y, down.weight.dtype))))
                y = y + update.to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises ValueError."""
        raise ValueError("A bottleneck adapter is non-linear and cannot be merged into the base weights; load the base "
                         "model and the adapter together with PeftModel.from_pretrained.")


class BottleneckModel(BaseTuner):
    """Wraps the chosen projections of a model in BottleneckLayer; made by `get_peft_model`.

    Raises ValueError when the model's type is not in PLACEMENTS and the config names no `target_modules`, and on every
    attempt to merge; TypeError when a named module is no linear projection.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            model_type = model_config.get("model_type")
            if model_type not in PLACEMENTS:
                raise ValueError(f"No bottleneck placement is known for model type {model_type!r}: pass "
                                 "target_modules, the names of its attention and feed-forward output projections.")
            attention, feed_forward = PLACEMENTS[model_type]
            ending = feed_forward if peft_config.placement == "pfeiffer" else f"({attention}|{feed_forward})"
            # The dot before the ending keeps it from starting in the middle of a longer module name.
            peft_config.target_modules = rf"(.*\.)?{ending}"
        return peft_config

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key):
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        projection = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(projection, nn.Linear | Conv1D):
            raise TypeError(f"A bottleneck adapter needs a linear projection, but target module {current_key!r} is a "
                            f"{type(projection).__name__}; correct target_modules.")
        self._replace_module(parent, target_name, BottleneckLayer(target, adapter_name, peft_config), target)


def _register() -> None:
    """Make PEFT know the method; safe to run again, when the module is reloaded or imported under a second name."""
    if "BOTTLENECK" not in PeftType.__members__:
        # register_peft_method accepts members of this enum only, and Python offers no public way to add one.
        member = str.__new__(PeftType, "BOTTLENECK")
        member._name_ = member._value_ = "BOTTLENECK"
        PeftType.BOTTLENECK = member  # before the maps are filled: the enum refuses to reassign a member
        PeftType._member_map_["BOTTLENECK"] = PeftType._value2member_map_["BOTTLENECK"] = member
        PeftType._member_names_.append("BOTTLENECK")
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(PeftType.BOTTLENECK, None)
    register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)


_register()
