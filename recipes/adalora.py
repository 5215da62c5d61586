"""AdaLoRA: LoRA whose rank moves to the matrices that need it (Zhang et al., 2023, arXiv:2303.10512).

    accelerate launch scripts/train.py --recipe adalora --model gpt2 --data data/customer_service --output_dir runs/adalora-gpt2

The update of each frozen matrix is B diag(E) A. All start with --init_rank singular values E; those that matter least are taken away
while training goes on, until --target_rank are left on average. E starts at zero, so training starts from the model as it is. The best
checkpoint is chosen among those from then on.

To make your own: copy this file, change `adapt`, and run it under its new name.
"""

from dataclasses import dataclass

from recipes.common import args
from recipes.common.args import option, trainer_option
from recipes.common.errors import UserError


@dataclass
class MethodArguments(args.Method):
    peft_method = "ADALORA"

    learning_rate: float = trainer_option(2e-3, "that of LoRA, whose update it is but for the ranks; tuned for two tasks (docs/results.md)",
                                          classify=6e-3, tag=6e-3)
    init_rank: int = option(12, "rank of each update at the start; half as much again as the target, as in the paper", at_least=2)
    target_rank: int = option(8, "mean rank of the updates at the end", at_least=1, search=(4, 6, 8, 10))
    alpha: int = option(16, "the update is scaled by alpha / init_rank", at_least=1)
    dropout: float = option(0.0, "dropout on the input of A", at_least=0, below=1)
    first_share: float = option(0.1, "share of the steps before the first value is taken away", at_least=0, below=1)
    last_share: float = option(0.3, "share of the steps that train on with the final ranks", at_least=0, below=1)
    every: int = option(10, "steps between two cuts", at_least=1)
    beta: float = option(0.85, "smoothing of importance and of its uncertainty, from step to step", at_least=0.01, below=1)
    orthogonal_weight: float = option(0.5, "weight of the term that keeps A and B orthogonal, as E is only then a spectrum", at_least=0)

    def check(self, shared, training):
        if self.target_rank >= self.init_rank:
            raise UserError(f"--target_rank {self.target_rank} leaves nothing to take away: choose it below --init_rank {self.init_rank}")
        if self.first_share + self.last_share >= 1:
            raise UserError(f"--first_share {self.first_share} and --last_share {self.last_share} leave no steps between them to cut the "
                            "ranks in: let them add up to less than 1")
        if shared.on_nan != "stop":
            raise UserError(f"--on_nan {shared.on_nan} leaves steps out, which the ranks' schedule can't follow: leave it at stop")
        if shared.max_minutes is not None:
            raise UserError("--max_minutes may end before the ranks are cut, which goes by steps: use --max_steps or --max_tokens")
        if training.fp16:
            raise UserError("--fp16 skips and scales steps, which the ranks' schedule can't follow: train with --bf16")


def adapt(model, task, method, training):
    """Freeze `model` and add the update. Returns the wrapped model and the Trainer callbacks that it needs."""
    from peft import AdaLoraConfig, get_peft_model

    from recipes.common import models, rank_allocation, runs

    steps = training.max_steps if training.max_steps > 0 else runs.steps(len(task.train), training, task.steps)
    first, last = int(method.first_share * steps), max(1, round(method.last_share * steps))
    if steps - last - max(first, 1) < 1:  # the first cut needs the importance of at least one step before it
        raise UserError(f"{steps} steps are too few to cut ranks in: raise --num_train_epochs or --max_steps")
    config = AdaLoraConfig(task_type=task.peft_type, init_r=method.init_rank, target_r=method.target_rank, lora_alpha=method.alpha,
                           lora_dropout=method.dropout, tinit=first, tfinal=last, deltaT=method.every, total_step=steps,
                           beta1=method.beta, beta2=method.beta, orth_reg_weight=method.orthogonal_weight, target_modules="all-linear",
                           exclude_modules=models.new_heads(task.peft_type), modules_to_save=task.new_modules())
    if training.process_index == 0:
        print(f"ranks: {method.init_rank} a matrix until step {first}, then cut every {method.every} steps down to {method.target_rank} on "
              f"average in step {steps - last} of {steps}")
    model = get_peft_model(model, config)
    return model, [rank_allocation.AllocateRanks(model, task.method_report)]


def main():
    shared, method, training = args.parse(__doc__, MethodArguments)
    from recipes.common import runs, tasks  # after the command line is understood: these import torch
    from recipes.common.trainer import RecipeTrainer

    with runs.start(shared, method, training):
        task = tasks.load(shared, method, training)
        model, callbacks = adapt(task.load_model(method.load_in_4bit), task, method, training)
        trainer = RecipeTrainer(
            model=model,
            args=training,
            task=task,
            shared=shared,
            method=method,
            train_dataset=task.train,
            eval_dataset=task.dev,
            data_collator=task.collate,
            processing_class=task.tokenizer,
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=runs.checkpoint(training))
        runs.finish(trainer, task, shared, method)


if __name__ == "__main__":
    main()
