"""Adapter: freeze the model and learn small bottleneck networks between its layers (Houlsby et al., 2019, arXiv:1902.00751).

    accelerate launch scripts/train.py --recipe adapter --model gpt2 --data data/customer_service --output_dir runs/adapter-gpt2

After the attention and the feed-forward part of each block, the hidden state goes through a narrow network and is added to
itself: y + up(activation(down(y))). `up` starts at zero, so training starts from the model as it is.

To make your own: copy this file, change `adapt`, and run it under its new name.
"""

from dataclasses import dataclass
from typing import Literal

from recipes.common import args
from recipes.common.args import option, trainer_option


@dataclass
class MethodArguments(args.Method):
    peft_method = "BOTTLENECK"

    learning_rate: float = trainer_option(3e-3, "best on SmolLM2-135M (docs/benchmarks.md); new weights need large steps", classify=1e-3)
    bottleneck_size: int = option(32, "width of the bottleneck; 8 to 64 did equally well in the paper", at_least=1, search=(8, 16, 32, 64))
    placement: Literal["houlsby", "pfeiffer"] = option("houlsby", "pfeiffer: after the feed-forward part only, half as many")
    activation: Literal["gelu", "relu", "silu", "tanh"] = option("gelu", "what stands between down and up")
    dropout: float = option(0.0, "dropout inside the bottleneck, which holds back enough by being narrow", at_least=0, below=1)


def adapt(model, task, method, training):
    """Freeze `model` and insert the adapters. Returns the wrapped model and the Trainer callbacks that it needs."""
    from peft import get_peft_model

    from recipes.common.bottleneck import BottleneckConfig

    config = BottleneckConfig(task_type=task.peft_type, bottleneck_size=method.bottleneck_size, placement=method.placement,
                              activation=method.activation, dropout=method.dropout, modules_to_save=task.new_modules())
    return get_peft_model(model, config), []


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
