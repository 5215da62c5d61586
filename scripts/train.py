"""Run a recipe by its name:

    accelerate launch scripts/train.py --recipe lora --model gpt2 --data data/customer_service --output_dir runs/lora-gpt2

`--recipe` is the name of a file in recipes/ or the path of any other .py file. All further flags are the recipe's own:
`--recipe lora --help` shows them. Without a recipe, the recipes are listed.

    python scripts/train.py --config runs/lora-gpt2/run.json --output_dir runs/lora-gpt2-again

repeats a finished run with everything that its run.json says; further flags change some of it.
"""

import ast
import json
import runpy
import shlex
import sys
from pathlib import Path

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, errors
from recipes.common.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "recipes"


def recipes() -> dict[str, str]:
    """Name of each recipe in recipes/ -> the first line of its docstring. Reads the files, runs nothing."""
    found = {}
    for path in sorted(FOLDER.glob("[!_]*.py")):
        lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
        found[path.stem] = lines[0] if lines else "(no docstring)"
    return found


def listing() -> str:
    """The recipes, a line each."""
    return "\n".join(f"  {name:<10} {line}" for name, line in recipes().items())


def find(name: str) -> Path:
    """The file of recipe `name`. Raises `UserError` that lists the recipes."""
    path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if not path.is_file() or path.name.startswith("_"):
        raise UserError(f"unknown recipe {name}: there is no {path}; the recipes are\n{listing()}")
    return path


def repeat(config: str) -> tuple[str, list[str]]:
    """The recipe's file and the flags that give the run of this run.json again. Raises `UserError`."""
    try:
        record = json.loads(Path(config).read_text(encoding="utf-8"))
        file = next(word for word in shlex.split(record["command"]) if word.endswith(".py"))
        path = file if Path(file).is_file() else str(find(record["recipe"]))
        return path, [*args.of_record(record, runpy.run_path(path)["MethodArguments"]), "--repeats", config]
    except OSError as error:
        raise UserError(f"--config {config}: {error.strerror or error}; name the run.json of a finished run") from None
    except (ValueError, KeyError, TypeError, StopIteration):
        raise UserError(f"--config {config} is no run.json of a finished run") from None


def main():
    errors.install()
    argv = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith(("--recipe=", "--config=")) else [word])]
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise UserError("--config needs the run.json of a finished run")
        recipe, words = repeat(argv[at + 1])
        argv = [*([] if "--recipe" in argv else ["--recipe", recipe]), *words, *argv[:at], *argv[at + 2:]]
    if "--recipe" not in argv:
        print(f"{__doc__.strip()}\n\nRecipes:\n{listing()}", file=sys.stdout if {"-h", "--help"} & set(argv) else sys.stderr)
        sys.exit(0 if {"-h", "--help"} & set(argv) else 2)
    at = argv.index("--recipe")
    if at + 1 == len(argv):
        raise UserError(f"--recipe needs a name; the recipes are\n{listing()}")
    path = find(argv[at + 1])
    sys.argv = [str(path), *argv[:at], *argv[at + 2:]]
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
