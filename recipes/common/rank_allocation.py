"""AdaLoRA under the Trainer: PEFT's allocator called at every step, orthogonal factors, and a state that survives a resume."""

import warnings

import torch
from transformers import TrainerCallback

AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # PEFT's names: smoothed importance of each weight, and how uncertain it is


class AllocateRanks(TrainerCallback):
    """Takes singular values away as arXiv:2303.10512 has it; `model` is a `PeftModel` with an AdaLoRA adapter named "default".

    At the end, the rank of each matrix goes into `report`, which goes into run.json.
    """

    def __init__(self, model, report: dict):
        self.tuner, self.config, self.report = model.base_model, model.peft_config["default"], report
        # A matrix of rank 0 is saved as (0, width) and (width, 0), which PEFT takes for a shard of DeepSpeed's; those are one-dimensional.
        warnings.filterwarnings("ignore", r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape: [\w.]+:\((0, \d+|\d+, 0)\)")
        self.names = [name for name, _ in self._matrices()]
        for name, parameter in self._matrices():
            layer, kind = self._layer(name)
            for average in AVERAGES:  # buffers of the model, so that checkpoints hold them (trained.state_of)
                layer.register_buffer(f"kept_{kind}_{average}", torch.zeros_like(parameter), persistent=False)

    def on_train_begin(self, args, state, control, **kwargs):
        """After a resume, hand PEFT what the checkpoint held. Raises `ValueError` if the planned steps are not the Trainer's."""
        if state.max_steps != self.config.total_step:
            raise ValueError(f"ranks are planned over {self.config.total_step} steps, but the Trainer takes {state.max_steps}")
        last = self.config.total_step - self.config.tfinal
        if 0 < state.global_step < last:
            allocator = self.tuner.rankallocator
            for name, parameter in self._matrices():
                layer, kind = self._layer(name)
                allocator.ipt[name] = torch.zeros_like(parameter)
                for average in AVERAGES:
                    getattr(allocator, average)[name] = getattr(layer, f"kept_{kind}_{average}").clone()
        elif state.global_step >= last:
            self._follow_values()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Add the gradient of the orthogonality term. It sees no data, so once a step is exact, and the logged loss stays the data's."""
        if self.config.orth_reg_weight == 0:
            return
        factors = [(name, p) for name, p in self._matrices() if "lora_E" not in name]
        with torch.enable_grad():
            total = sum(_distance_to_orthogonal(p if "lora_A" in name else p.T) for name, p in factors)
            penalty = self.config.orth_reg_weight * total / len(factors)
            gradients = torch.autograd.grad(penalty, [p for _, p in factors])
        for (_, p), gradient in zip(factors, gradients, strict=True):
            p.grad.add_(gradient)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """The gradients are still there, and `state.global_step` does not count this step yet."""
        step = state.global_step + 1
        self.tuner.update_and_allocate(step)
        if step == self.config.total_step - self.config.tfinal:
            # The best checkpoint so far has more ranks than were asked for: from here on, the best is chosen anew.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        allocator = self.tuner.rankallocator
        for name in self.names if allocator.ipt else ():
            layer, kind = self._layer(name)
            for average in AVERAGES:
                getattr(layer, f"kept_{kind}_{average}").copy_(getattr(allocator, average)[name])

    def on_train_end(self, args, state, control, **kwargs):
        """What is saved is what the singular values of the checkpoint that is kept say."""
        self._follow_values()
        ranks = self.report["rank_pattern"] = self.ranks()
        if state.is_world_process_zero:
            target = self.config.target_r * len(ranks)
            late = "" if sum(ranks.values()) == target else "; the training ended before the budget was met"
            print(f"ranks: {sum(ranks.values())} in all, {target} planned, {min(ranks.values())} to {max(ranks.values())} a matrix{late}")

    def ranks(self) -> dict[str, int]:
        """The rank that each matrix has now, by its module's name."""
        return {name.removesuffix(".lora_E.default"): int((p != 0).sum()) for name, p in self._matrices() if "lora_E" in name}

    def _follow_values(self):
        values = {name: p for name, p in self._matrices() if "lora_E" in name}
        self.config.rank_pattern = {name: (p != 0).flatten().tolist() for name, p in values.items()}

    def _matrices(self):
        return [(name, p) for name, p in self.tuner.model.named_parameters() if "lora_" in name and "default" in name]

    def _layer(self, name):
        path, kind, _ = name.rsplit(".", 2)
        return self.tuner.model.get_submodule(path), kind


def _distance_to_orthogonal(rows: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of P P^T - I for P = `rows`, (rank, width); the paper's equation 4 as PEFT has it, unsquared."""
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype))
