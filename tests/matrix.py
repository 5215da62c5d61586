"""What works with what, as the code says it (tasks.why_not), and the table of both READMEs that is made from it.

    python tests/matrix.py

writes the table anew, between two marks. A new task needs no line here, a new method one, a new reason its Chinese.
"""

import importlib
import re
from pathlib import Path

from recipes.common import models, tasks

ROOT = Path(__file__).resolve().parent.parent
TASKS = sorted(path.stem for path in (ROOT / "recipes/common/tasks").glob("[!_]*.py"))
METHODS = ("full", "lora", "adalora", "prefix", "adapter")
MARKS = ("<!-- what works: made by tests/matrix.py -->\n", "<!-- end of what works -->\n")
LANGUAGES = {"README.md": str, "README.zh-CN.md": lambda text: CHINESE[text]}
CHINESE = {
    "all": "全部", "all but {}": "除 {} 外全部", ", {}": "，{}", "none": "无",
    "decoder-only (GPT-2, Llama)": "仅解码器（GPT-2、Llama）", "encoder (BERT)": "编码器（BERT）",
    "encoder-decoder (T5)": "编码器-解码器（T5）",
    "- `{task}`, {kind}{methods}: {reason}": "- `{task}`，{kind}{methods}：{reason}",
    "can't write: use a decoder-only model (smollm2)": "不会生成文本：请用仅解码器的模型（smollm2）",
    "can't write: use an encoder-decoder, or a decoder-only model (smollm2)":
        "不会生成文本：请用编码器-解码器，或仅解码器的模型（smollm2）",
    "reads one text and writes another, while a dialogue is one text: use a decoder-only model (smollm2), or --task translate for single "
    "questions": "读入一段文本，写出另一段，而对话是一整段文本：请用仅解码器的模型（smollm2），单个问题可用 --task translate",
    "learns text by filling in spans, which is not offered: use a decoder-only model or an encoder":
        "以填补片段的方式学习文本，这里没有提供：请用仅解码器的模型或编码器",
    "PEFT can't put a prefix before its classifiers: use --recipe lora or adapter":
        "PEFT 不能在它的分类模型前放置前缀：请用 --recipe lora 或 adapter",
}


def cells() -> dict[tuple[str, str, str], str | None]:
    """(task, kind of model, method) -> None where it works, else the reason why it is refused."""
    methods = {name: importlib.import_module(f"recipes.{name}").MethodArguments() for name in METHODS}
    return {(task, kind, name): tasks.why_not(task, kind, method)
            for task in TASKS for kind in models.KINDS for name, method in methods.items()}


def table(say) -> str:
    """The table in Markdown and below it the reasons; `say` translates."""
    found = cells()
    kinds = {kind: say(name.removeprefix("a ").removeprefix("an ").replace(" model", "")) for kind, name in models.KINDS.items()}
    lines = ["| `--task` | " + " | ".join(kinds.values()) + " |", "|---" * (len(kinds) + 1) + "|"]
    reasons = []
    for task in TASKS:
        row = [f"`{task}`"]
        for kind in kinds:
            refused = {name: found[task, kind, name] for name in METHODS if found[task, kind, name]}
            some = say("all but {}").format(", ".join(f"`{name}`" for name in refused)) if refused else say("all")
            row.append(say("none") if len(refused) == len(METHODS) else some)
            for reason in dict.fromkeys(refused.values()):
                of = [f"`{name}`" for name, own in refused.items() if own == reason]
                methods = "" if len(of) == len(METHODS) else say(", {}").format(", ".join(of))
                reasons.append(say("- `{task}`, {kind}{methods}: {reason}").format(task=task, kind=kinds[kind], methods=methods,
                                                                                   reason=say(reason)))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *reasons]) + "\n"


def written(text: str, say) -> str:
    """The text of a README with the table of now."""
    start, end = map(re.escape, MARKS)
    return re.sub(f"(?<={start}).*?(?={end})", lambda _: "\n" + table(say) + "\n", text, count=1, flags=re.S)


if __name__ == "__main__":
    for name, say in LANGUAGES.items():
        path = ROOT / name
        path.write_text(written(path.read_text(encoding="utf-8"), say), encoding="utf-8")
