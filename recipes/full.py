"""Full fine-tuning: train every weight of the model, or only its upper part (`--train_top_layers`).

    accelerate launch scripts/train.py --recipe full --model gpt2 --data data/customer_service --output_dir runs/full-gpt2

The strongest method where data and memory allow it: each weight costs 16 bytes (itself, its gradient, two moments of Adam), and the
result is a whole model. On few conversations it forgets the most.

To make your own: copy this file, change `adapt`, and run it under its new name.
"""

from dataclasses import dataclass

from recipes.common import args
from recipes.common.args import option, trainer_option
from recipes.common.errors import UserError


@dataclass
class MethodArguments(args.Method):
    learns_from_scratch = True
    peft_method = ""

    learning_rate: float = trainer_option(2e-4, "best on SmolLM2-135M (docs/benchmarks.md); models of billions want 1e-5",
                                          tag=3e-4, from_scratch=1e-3)
    weight_decay: float = trainer_option(0.01, "a mild pull towards zero, the usual value for fine-tuning")
    train_top_layers: int = option(None, "freeze all but the top N blocks, the final norm and the head; default: train all", at_least=1)

    def check(self, shared, training):
        if shared.from_scratch and self.train_top_layers is not None:
            raise UserError("--train_top_layers would leave the lower layers as --from_scratch draws them: leave it out")

    def refuses(self, task, kind):
        if kind == "encoder-decoder" and self.train_top_layers is not None:
            return ("has two stacks of blocks, so its top layers are not defined: leave --train_top_layers out, or train less with "
                    "--recipe lora or adapter")


def adapt(model, task, method, training):
    """Choose what is trained. Returns the model and the Trainer callbacks that it needs."""
    from recipes.common import models

    if method.train_top_layers is not None:
        models.train_top_layers(model, method.train_top_layers)
    return model, []


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
