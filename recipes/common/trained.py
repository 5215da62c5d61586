"""The parameters that a PEFT method trains, as they are: PEFT's own files may hold only what they amount to, as of a prefix that comes from
a network, which is right for use, and useless to train on."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recipes.common.errors import UserError

# Settings of a PEFT method that say nothing about what its weights mean.
MAY_DIFFER = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "lora_dropout", "dropout",
              "total_step", "tinit", "tfinal", "rank_pattern"}
FILE = "trained_parameters.safetensors"


def state_of(model) -> dict[str, torch.Tensor]:
    """The parameters that are trained, and the buffers that a method named kept_... to find them again after a resume; by name,
    sharing memory with the model."""
    kept = {name: b for name, b in model.named_buffers() if name.rpartition(".")[2].startswith("kept_")}
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} | kept


def save(model: PeftModel, folder: Path) -> None:
    """Write them beside what PEFT has written into `folder`."""
    save_file(state_of(model), folder / FILE)


def load(folder: Path, model: PeftModel) -> None:
    """Set the trained parameters of `model` to those of a checkpoint or run. Raises `UserError` if they are others."""
    try:
        state = load_file(folder / FILE)
    except SafetensorError as error:
        raise UserError(f"{folder} is damaged ({error}): resume from another checkpoint by naming its folder") from error
    own = state_of(model)
    if {name: p.shape for name, p in state.items()} != {name: p.shape for name, p in own.items()}:
        raise UserError(f"{folder} was written by another method or with other settings: resume with the same recipe and flags")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def check_goes_on(run: Path, peft_method: str | None) -> None:
    """Raise `UserError` if `run` holds an adapter that a method which makes `peft_method` (args.Method) can't train further."""
    if (run / "config.json").is_file():
        return
    if gone := [name for name in ("adapter_config.json", FILE) if not (run / name).is_file()]:
        raise UserError(f"--start_from {run} lacks {gone[0]}, without which a training can't go on: train it again under a new name")
    record, kind = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("run.json", "adapter_config.json"))
    if peft_method is not None and peft_method != kind["peft_type"]:
        raise UserError(f"--start_from {run} was made by the recipe {record['recipe']}: go on with that one")


def go_on_from(run: Path, model, method=None) -> None:
    """Set `model` to what the run learned: a whole model was loaded as such; an adapter's method and settings must be the same.

    `method` (args.Method) gives a setting the name of its flag. Raises `UserError`.
    """
    own = model.active_peft_config if isinstance(model, PeftModel) else None
    check_goes_on(run, own.peft_type if own else "")
    if (run / "config.json").is_file():
        return
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    theirs, now, before, wrong = PeftConfig.from_pretrained(run), asdict(method) if method else {}, record.get("method_arguments", {}), []
    for name in sorted(own.__dict__.keys() - MAY_DIFFER):
        mine, other = ((set(value) if isinstance(value, list) else value) for value in (getattr(own, name), getattr(theirs, name, None)))
        if mine != other:
            values = [f for f in now if (now[f], before.get(f)) == (mine, other)]  # PEFT's name may be another than the flag's
            flag = name if name in now else values[0] if values else None
            wrong.append(f"--{flag} {before.get(flag)}, not {now[flag]}" if flag else f"{name} {other}, not {mine}")
    if wrong:
        raise UserError(f"--start_from {run} was trained with {', and with '.join(dict.fromkeys(wrong))}: go on in the same way")
    load(run, model)


def check_same_kind(checkpoint, model) -> None:
    """Raise `UserError` if a PEFT method is to resume from a whole model's checkpoint, or the other way round, or from a pickle."""
    if any(Path(checkpoint).glob("*.bin")) and not any(Path(checkpoint).glob("*.safetensors")):
        raise UserError(f"{checkpoint} holds pickled weights, which are not loaded, as a pickle can run any code when it is opened: resume "
                        "from a checkpoint with safetensors")
    if (Path(checkpoint) / FILE).is_file() != isinstance(model, PeftModel):
        raise UserError(f"{checkpoint} is no checkpoint of this method: resume with the recipe and the flags that wrote it")
