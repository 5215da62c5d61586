"""Prefix-tuning: freeze the model and learn keys and values that stand before every dialogue (Li and Liang, 2021, arXiv:2101.00190).

    accelerate launch scripts/train.py --recipe prefix --model gpt2 --data data/customer_service --output_dir runs/prefix-gpt2

Each attention layer sees `num_virtual_tokens` positions that no token ever produced; only those are trained. Nothing in the model
itself changes, so one model can serve many prefixes. They take room in the model's window and can't be merged into its weights.

To make your own: copy this file, change `adapt`, and run it under its new name.
"""

from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Literal

from recipes.common import args
from recipes.common.args import option, trainer_option
from recipes.common.errors import UserError


@dataclass
class MethodArguments(args.Method):
    peft_method = "PREFIX_TUNING"

    learning_rate: float = trainer_option(5e-2, "best on SmolLM2-135M (docs/benchmarks.md); high, as few numbers must do it all",
                                          prefix_projection=1e-3, classify=1e-2)
    num_virtual_tokens: int = option(100, "length of the prefix; the paper's best are 5 to 200 (figure 4), ours in docs/benchmarks.md",
                                     {"classify": 20, "tag": 20}, at_least=1, search=(10, 20, 50, 100))
    start: Literal["text", "random"] = option("text", "start from what the first train tokens leave in the attention layers; a random "
                                              "prefix disturbs the model for hundreds of steps")
    prefix_projection: bool = option(False, "compute the prefix from a network, as in the paper: 5 times the parameters of 100 virtual "
                                           "tokens, 25 times those of 20")
    projection_hidden_size: int = option(512, "width of that network (the paper's 512)", at_least=1)

    def check(self, shared, training):
        if training.activation_checkpointing or training.gradient_checkpointing:
            raise UserError("--activation_checkpointing would drop the prefix from the recomputed layers: leave it out for this recipe")
        if shared.layer_lr_decay != 1:
            raise UserError("--layer_lr_decay: a prefix belongs to no block of the model, so all of it learns alike: leave it out")
        if self.projection_hidden_size != 512 and not self.prefix_projection:
            raise UserError("--projection_hidden_size is the width of the network of --prefix_projection: add that, or leave it out")

    def positions(self):
        return self.num_virtual_tokens

    def refuses(self, task, kind):
        if kind == "encoder-decoder" and task in ("classify", "tag"):  # test_matrix.py shows what happens
            return "PEFT can't put a prefix before its classifiers: use --recipe lora or adapter"


def adapt(model, task, method, training):
    """Freeze `model` and put the prefix before it. Returns the wrapped model and the Trainer callbacks that it needs."""
    from peft import PrefixTuningConfig, get_peft_model

    from recipes.common import models
    from recipes.common.prefix_start import start_from_tokens, takes_keys_and_values

    if not takes_keys_and_values(model):
        raise UserError(f"--model: {model.config.model_type} models take no keys and values before their text: use --recipe lora")
    if task.window and task.max_length + method.num_virtual_tokens > task.window:
        raise UserError(f"--max_length {task.max_length} and --num_virtual_tokens {method.num_virtual_tokens} exceed together the "
                        f"{task.window} tokens that the model can read: lower one of them")
    config = PrefixTuningConfig(task_type=task.peft_type, num_virtual_tokens=method.num_virtual_tokens,
                                prefix_projection=method.prefix_projection, encoder_hidden_size=method.projection_hidden_size,
                                modules_to_save=task.new_modules())
    model = models.keep_segments(get_peft_model(model, config))
    layers = model.active_peft_config.num_layers
    if model.config.is_encoder_decoder and layers % 2 == 0:  # test_matrix.py shows which
        print("note: PEFT puts the prefix before the decoder's own attention only, where two layers each share theirs: half of the "
              f"{method.num_virtual_tokens} x {2 * layers} keys and values that are trained have no effect")
    if method.start == "text":
        text = chain.from_iterable(row["input_ids"] for row in cycle(task.train))
        if not start_from_tokens(model, list(islice(text, method.num_virtual_tokens))):
            print("note: the prefix of an encoder-decoder starts at random; give it more steps")
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
