"""LoRA: freeze the model and learn a low-rank update of its weight matrices (Hu et al., 2021, arXiv:2106.09685).

    accelerate launch scripts/train.py --recipe lora --model gpt2 --data data/customer_service --output_dir runs/lora-gpt2

Each frozen matrix W becomes W + (alpha / rank) B A, where only A (rank x inputs) and B (outputs x rank) are trained. B starts at
zero, so training starts from the model as it is. Three flags change the method: rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski,
2023, arXiv:2312.03732), DoRA trains the length of each output's weights apart from their direction (Liu et al., 2024, arXiv:2402.09353),
and QLoRA holds the frozen matrices in 4 bits (Dettmers et al., 2023, arXiv:2305.14314).

To make your own: copy this file, change `adapt`, and run it under its new name.
"""

from dataclasses import dataclass

from recipes.common import args
from recipes.common.args import option, trainer_option
from recipes.common.errors import UserError


@dataclass
class MethodArguments(args.Method):
    peft_method = "LORA"

    learning_rate: float = trainer_option(2e-3, "best on SmolLM2-135M (docs/benchmarks.md); models of billions want 2e-4", classify=1e-3)
    rank: int = option(8, "rank of the update B A: more learns more and forgets more; 4 to 64 are common", at_least=1,
                       search=(4, 8, 16, 32))
    alpha: int = option(16, "the update is scaled by alpha / rank; twice the rank is the usual choice", at_least=1)
    dropout: float = option(0.0, "dropout on the input of A; the low rank holds back enough, and masks cost a CPU a fifth of a step",
                            at_least=0, below=1)
    target_modules: str = option("all-linear", "matrices to update: all-linear, or names separated by commas (q_proj,v_proj)")
    use_rslora: bool = option(False, "rsLoRA: scale by alpha / sqrt(rank), so that a high rank does not learn more slowly")
    use_dora: bool = option(False, "DoRA: train the length of each output's weights too; often better at a low rank, and slower")
    load_in_4bit: bool = option(False, "QLoRA: hold the frozen matrices in 4 bits, a quarter of the memory; needs an NVIDIA GPU and "
                                "bitsandbytes")

    def check(self, shared, training):
        if self.load_in_4bit:
            from recipes.common import models

            models.check_4bit(training.device)


def adapt(model, task, method, training):
    """Freeze `model` and add the update. Returns the wrapped model and the Trainer callbacks that it needs."""
    from peft import LoraConfig, get_peft_model

    from recipes.common import fast_lora, models

    targets = method.target_modules if method.target_modules == "all-linear" else method.target_modules.split(",")
    config = LoraConfig(task_type=task.peft_type, r=method.rank, lora_alpha=method.alpha, lora_dropout=method.dropout,
                        target_modules=targets, exclude_modules=models.new_heads(task.peft_type),
                        modules_to_save=task.new_modules(), use_rslora=method.use_rslora, use_dora=method.use_dora)
    try:
        return fast_lora.speed_up(get_peft_model(model, config)), []
    except ValueError as error:  # PEFT's own sentence names the modules that it did not find
        raise UserError(f"--target_modules {method.target_modules}: {error}") from error


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
