"""Hold a finished run against golden dialogues, scripted conversations with rules for the answers:

    python scripts/check.py --run runs/lora-gpt2 --cases data/customer_service/cases.yaml
    python scripts/check.py --run runs/lora-gpt2 --cases data/customer_service/cases.yaml --against runs/full-gpt2

The model answers each turn greedily, given its own earlier answers. recipes/common/cases.py describes the file and its rules: must_say,
must_not_say, must_ask_for, must_hand_over. The exit status is 0 if all cases pass, 1 if some fail, and 2 if there is nothing to say, as
the file, the run or a flag is wrong.
"""

import argparse
import difflib
import json
import sys
from pathlib import Path

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, errors
from recipes.common.errors import UserError
from recipes.common.wording import counted


def main() -> int:
    return errors.status_of(lambda: check(parse()))


def check(options) -> int:
    """Answer, judge, print. Returns the exit status."""
    from recipes.common import cases

    golden = cases.load(Path(options.cases))
    if options.json and (Path(options.json).is_dir() or not Path(options.json).absolute().parent.is_dir()):
        raise UserError(f"--json {options.json}: name a file in a folder that exists")
    folders = [options.run, *([options.against] if options.against else [])]
    for flag, folder in zip(("--run", "--against"), folders, strict=False):
        _refuse_other_tasks(flag, Path(folder))
    own, *others = [judged(golden, answers(golden, Path(folder), options.max_new_tokens)) for folder in folders]
    for result in own:
        print(shown(result))
    failed = sum(not result["passed"] for result in own)
    print(f"\n{len(own) - failed} of {len(own)} cases pass")
    for theirs in others:
        print(compared(own, theirs, options.against))
    if options.json:
        record = {"run": options.run, "cases": own, **({"against": {"run": options.against, "cases": others[0]}} if others else {})}
        with errors.writing(f"--json {options.json}"):
            Path(options.json).write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return int(failed > 0)


def _refuse_other_tasks(flag: str, folder: Path) -> None:
    from recipes.common import models

    record = models.read_record(folder, flag)
    if record["task"] != "chat":
        raise UserError(f"{flag} {folder} was trained for --task {record['task']}, not to chat: score it with scripts/evaluate.py")


def answers(golden, folder: Path, max_new_tokens: int) -> list[list[str]]:
    """What the run says to each turn of each case, all cases a turn at a time. Raises `UserError` for a turn that does not fit."""
    from recipes.common import chat, generation, models

    model, tokenizer = models.load_run(folder, merge=True), models.load_run_tokenizer(folder)
    limit, cut = generation.limit(model, 10**9, max_new_tokens), 0
    said = [[] for _ in golden]
    for turn in range(max(len(case.turns) for case in golden)):
        at, prompts = [i for i, case in enumerate(golden) if turn < len(case.turns)], []
        for i in at:
            messages = conversation(golden[i], said[i])
            try:
                whole, prompt = (chat.prompt(messages, tokenizer, tokens) for tokens in (10**9, limit))
            except chat.TemplateError as error:
                raise UserError(f"--run {folder}: case {golden[i].name!r}: {error}") from error
            if prompt is None:
                raise UserError(f"case {golden[i].name!r}, turn {turn + 1}: longer than the window of {folder}: shorten it")
            if len(prompt) < len(whole):
                print(f"note: {golden[i].name}, turn {turn + 1}: the oldest turns no longer fit into the window of {folder}")
            prompts.append(prompt)
        texts, unended = generation.replies(model, tokenizer, prompts, max_new_tokens, description=f"{folder}, turn {turn + 1}")
        cut += unended
        for i, text in zip(at, texts, strict=True):
            said[i].append(text)
    if cut:
        print(f"note: {counted(cut, 'answers')} of {folder} did not end within {max_new_tokens} tokens")
    return said


def conversation(case, said: list[str]) -> list[dict]:
    """The turns of a case up to the next answer, with the model's own answers so far."""
    messages = [{"role": "system", "content": case.system}] if case.system else []
    for turn, answer in zip(case.turns, said, strict=False):
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": case.turns[len(said)].user}]


def judged(golden, said: list[list[str]]) -> list[dict]:
    """Each case with its verdict and its turns: what was said, and what is wrong with it."""
    from recipes.common import cases

    out = []
    for case, texts in zip(golden, said, strict=True):
        turns = [{"user": turn.user, "answer": text, "wrong": cases.judge(turn.rules, text)}
                 for turn, text in zip(case.turns, texts, strict=True)]
        out.append({"name": case.name, "passed": not any(turn["wrong"] for turn in turns), "turns": turns})
    return out


def shown(result: dict) -> str:
    """A case as lines of text: the offending answers, if it fails."""
    lines = [f"{'pass' if result['passed'] else 'FAIL'}  {result['name']}"]
    for number, turn in enumerate(result["turns"], start=1):
        if turn["wrong"]:
            lines += [f"      turn {number}: {turn['user']}", f"      answer: {turn['answer'] or '(nothing)'}"]
            lines += [f"      {sentence}" for sentence in turn["wrong"]]
    return "\n".join(lines)


def compared(own: list[dict], theirs: list[dict], against: str) -> str:
    """A diff of the answers of two runs to the same cases."""
    lines, different = [], 0
    for ours, others in zip(own, theirs, strict=True):
        verdicts = f" ({'passes' if others['passed'] else 'fails'} there, {'passes' if ours['passed'] else 'fails'} here)"
        for number, (one, other) in enumerate(zip(ours["turns"], others["turns"], strict=True), start=1):
            if one["answer"] != other["answer"]:
                different += 1
                changed = "" if ours["passed"] == others["passed"] else verdicts
                lines += [f"\n{ours['name']}, turn {number}{changed}", *difflib.ndiff(other["answer"].splitlines() or [""],
                                                                                      one["answer"].splitlines() or [""])]
    turns = sum(len(result["turns"]) for result in own)
    passed = sum(result["passed"] for result in theirs)
    return "\n".join([f"{passed} of {len(theirs)} cases pass in {against} (-); {different} of {turns} answers differ",
                      *(line.rstrip("\n") for line in lines if not line.startswith("? "))])


def parse(argv=None):
    """The command line of this script."""
    parser = args.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", required=True, help="the run folder (--output_dir of the training)")
    parser.add_argument("--cases", required=True, help="the file of golden dialogues")
    parser.add_argument("--against", metavar="RUN", help="another run: show where its answers differ")
    parser.add_argument("--max_new_tokens", type=args.positive, default=128, help="longest answer (default: 128)")
    parser.add_argument("--json", metavar="OUT", help="write the answers and verdicts to this file as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
