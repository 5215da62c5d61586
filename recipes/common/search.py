"""The flags of a recipe that do best on dev, found by Optuna through the Trainer's own `hyperparameter_search`:

    python -m recipes.common.search --recipe lora --trials 8 --result lora.json --data data/customer_service --max_steps 20

scripts/compare.py --search starts this for each recipe. Searched are the learning rate, log-uniformly within a factor of 5 of the recipe's
default or of --learning_rate, and each flag of the recipe whose `option` names values in `search`, unless it is given. Trials are judged by
the dev score --metric of the checkpoint that a run would end with: its best, or its last with --load_best_model_at_end False. Nothing is
saved but the result.
"""

import argparse
import importlib.util
import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path

from recipes.common import args, errors
from recipes.common.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent
FACTOR = 5  # the learning rate is searched between its default divided and multiplied by this


def file_of(name: str) -> Path:
    """The file of a recipe: a name of recipes/ or the path of any .py file. Raises `UserError`."""
    path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if not path.is_file() or path.name.startswith("_"):
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("[!_]*.py")))
        raise UserError(f"unknown recipe {name}: there is no {path}; the recipes are {known}, or name any .py file")
    return path


def recipe_of(path: Path):
    """The module of a recipe's file; its main() is not run. Raises `UserError` for a file that is no recipe."""
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for what annotations name
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path} is no Python file: {error}") from error
    if missing := [name for name in ("MethodArguments", "adapt", "main") if not hasattr(module, name)]:
        raise UserError(f"{path} defines no {missing[0]}: a recipe has MethodArguments, adapt and main (CONTRIBUTING.md)")
    return module


def main():
    errors.install()
    parser = args.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, help="a file of recipes/, or any .py file")
    parser.add_argument("--trials", type=args.positive, required=True, help="how many settings to try")
    parser.add_argument("--metric", default="loss", help="the dev score by which trials are judged (default: loss)")
    parser.add_argument("--result", required=True, help="the JSON file to write")
    options, flags = parser.parse_known_args()
    path = file_of(options.recipe)
    sys.argv = [str(path), *flags]
    result = search(recipe_of(path), flags, options.trials, options.metric)
    from recipes.common import runs

    Path(options.result).write_text(json.dumps(runs.visible(result), indent=2) + "\n", encoding="utf-8")


def search(recipe, flags: list[str], trials: int, metric: str = "loss") -> dict:
    """Train `trials` times on the train rows, each time with other flags, and compare the dev score `metric`.

    Returns {"best": flag -> value, "metric", "trials": [{"settings", "value", "state"}]}. A trial that diverges counts as infinitely bad;
    one that does worse than the others after an epoch may end early (state PRUNED), and one whose settings the recipe refuses is not
    trained (PRUNED, with "why"). Raises `UserError` if none ends well.
    """
    shared, method, training = args.parse(recipe.__doc__, recipe.MethodArguments, [*flags, "--report_to", "none"])
    import optuna
    from transformers import EarlyStoppingCallback, set_seed

    from recipes.common import runs, tasks
    from recipes.common.trainer import RecipeTrainer, prepare

    if shared.adversarial != "none":
        raise UserError("--search trains many models in turn, which --adversarial can't follow: leave one of them out")
    if metric not in (there := args.dev_scores(shared)):
        raise UserError(f"--metric {metric} is not measured while training; dev rows are scored by {', '.join(there)}"
                        + ("; --eval_generate_rows 32 adds those of written answers" if metric in args.WRITTEN else ""))
    worst = math.inf if metric in args.LOWER_IS_BETTER else -math.inf
    keeps_best, training.load_best_model_at_end = training.load_best_model_at_end, False  # a trial has no checkpoint to load
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with runs.start(shared, method, training):
        task = tasks.load(shared, method, training)
        given, seen = args.named(args.underscored(flags)), []
        rate = method.learning_rate
        knobs = {f.name: f.metadata["search"] for f in fields(method) if "search" in f.metadata and f"--{f.name}" not in given}

        def rates(trial):
            return {"learning_rate": trial.suggest_float("learning_rate", rate / FACTOR, rate * FACTOR, log=True)}

        def model_for(trial):
            seen.append(trial)
            chosen = {name: trial.suggest_categorical(name, values) for name, values in knobs.items()}
            tried = replace(method, **chosen)
            try:
                tried.check(shared, training)
                model, callbacks = recipe.adapt(task.load_model(method.load_in_4bit), task, tried, training)
            except UserError as error:
                print(f"trial {trial.number + 1} is not trained: {error}")
                trial.set_user_attr("why", str(error))
                raise optuna.TrialPruned(str(error)) from error
            prepare(model, training, shared)
            for callback in own:
                trainer.remove_callback(callback)
            own[:] = callbacks
            for callback in callbacks:
                trainer.add_callback(callback)
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, EarlyStoppingCallback):
                    callback.early_stopping_patience_counter = 0
            set_seed(training.seed)  # as a Trainer does that is given its model: dropout then draws as in the run with these settings
            return model

        model, own = recipe.adapt(task.load_model(method.load_in_4bit), task, method, training)
        trainer = RecipeTrainer(model=model, args=training, task=task, shared=shared, train_dataset=task.train, eval_dataset=task.dev,
                                data_collator=task.collate, processing_class=task.tokenizer, callbacks=own)
        del model  # one at a time in memory
        trainer._save_checkpoint = lambda model, trial: None
        trainer.model_init = model_for  # the Trainer takes either a model or this; ours looks at the model it is given

        def value_of(scores: dict[str, float]) -> float:
            if keeps_best:
                trainer._determine_best_metric(scores, None)  # which the Trainer does too, but after it asks for this value
                scores = next((entry for entry in trainer.state.log_history
                               if entry["step"] == trainer.state.best_global_step and "eval_loss" in entry), scores)
            return judged(scores, metric, worst)

        try:
            best = trainer.hyperparameter_search(hp_space=rates, n_trials=trials, backend="optuna",
                                                 direction="minimize" if worst > 0 else "maximize",
                                                 compute_objective=value_of,
                                                 sampler=optuna.samplers.TPESampler(seed=training.seed))
        except ValueError as error:  # Optuna's, of a search without a trial that ended
            if refused := [trial.user_attrs["why"] for trial in seen[0].study.trials if "why" in trial.user_attrs]:
                raise UserError(f"{len(refused)} of {trials} trials could not be trained and the others did not end; the first: "
                                f"{refused[0]}") from error
            raise
        if best.objective == worst:
            raise UserError("every trial diverged: lower --learning_rate, around which the search looks")
        return {"best": best.hyperparameters, "metric": metric, "trials": [
            {"settings": trial.params, "value": trial.value, "state": trial.state.name, **trial.user_attrs}
            for trial in seen[0].study.trials]}


def judged(scores: dict[str, float], metric: str, worst: float) -> float:
    """The score of a trial, or `worst` of one that diverged: Optuna takes NaN for a trial that never ended, and labels told by a model
    whose loss is NaN have an accuracy like any others."""
    value = scores[f"eval_{metric}"]
    return value if math.isfinite(scores["eval_loss"]) and math.isfinite(value) else worst


if __name__ == "__main__":
    main()
