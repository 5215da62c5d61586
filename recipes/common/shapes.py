"""What a row of each task must look like, and other shapes of a dialogue -> `messages`. Pure: a row in, a row or a sentence out.

The shapes are those of OpenAI's chat files, ShareGPT, Alpaca, and question and answer in two columns; data/README.md describes them.
"""

import json
import math
import re

ROLES = ("system", "user", "assistant", "tool")
# What OpenAI and ShareGPT files call the roles. A function_call is the assistant's; an observation is what came back.
OTHER_ROLES = {"developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant",
               "function": "tool", "function_response": "tool", "observation": "tool"}
# Keys by which a turn may need more than a look: those of ShareGPT, and what OpenAI writes beside a content.
OTHER_KEYS = frozenset(("from", "value", "tool_calls", "function_call", "weight"))
# Columns of the question and of the answer; the first pair is Alpaca's.
PAIRS = (("instruction", "output"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("query", "response"))
LISTS = ("messages", "conversations", "history", "tokens", "tags", "label", "refs")  # what a CSV file writes as JSON
OPTIONAL = ("system", "input", "history", "text_pair", "id", "language", "domain")
# Names by which the first line of a table is known to be its header.
NAMES = {"text", "source", "target", *LISTS, *OPTIONAL, *(name for pair in PAIRS for name in pair)}


def dialogue(row: dict, pairs: bool = True) -> tuple[dict, str | None]:
    """`row` in the shape of the chat task, and what keeps it from taking that shape, in one sentence, or None.

    `pairs`: question and answer columns count as a dialogue. Columns that are not part of the dialogue are kept. A row in which no shape
    is recognised is returned as it is: whether a row keeps the contract is for `check_dialogue` to say.
    """
    shapes = [(name,) for name in ("messages", "conversations") if name in row]
    shapes = shapes or [pair for pair in PAIRS if pairs and pair[0] in row and pair[1] in row]
    if len(shapes) > 1:
        fitting = " and ".join("/".join(shape) for shape in shapes)
        return row, f"the columns fit more than one shape ({fitting}): rename the ones not meant, as in --columns unused={shapes[1][-1]}"
    if not shapes:
        return row, None
    [shape] = shapes
    if len(shape) == 2:
        used, (messages, wrong) = {*shape, "input", "history"}, _pair(row, *shape)
    elif isinstance(row[shape[0]], list):
        used, (messages, wrong) = {*shape}, _turns(row[shape[0]])
    else:
        used, messages, wrong = {*shape}, row[shape[0]], None
    if wrong:
        return row, wrong
    if row.get("system") and isinstance(messages, list):
        if any(isinstance(turn, dict) and turn.get("role") == "system" for turn in messages):
            return row, 'there is a column "system" and a system turn as well: keep one of them, as in --columns unused=system'
        messages, used = [{"role": "system", "content": row["system"]}, *messages], used | {"system"}
    return {"messages": messages, **{name: value for name, value in row.items() if name not in used}}, None


def context_turns(row: dict) -> int:
    """The number of assistant turns of a dialogue that keeps the contract which are read but not trained on."""
    return sum(turn["role"] == "assistant" and turn.get("train") is False for turn in row.get("messages", ()))


def _turns(turns: list) -> tuple[list, str | None]:
    messages = []
    for i, turn in enumerate(turns, start=1):
        if isinstance(turn, dict) and not _plain(turn):
            turn, wrong = _turn(turn)
            if wrong:
                return [], f"turn {i}: {wrong}"
        messages.append(turn)
    return messages, None


def _plain(turn: dict) -> bool:
    """Whether a turn has our shape already, as most have."""
    return type(turn.get("content")) is str and turn.get("role") in ROLES and turn.keys().isdisjoint(OTHER_KEYS)


def _turn(turn: dict) -> tuple[dict, str | None]:
    """A turn of OpenAI's or ShareGPT's kind as one of ours, and what is wrong with it."""
    turn = dict(turn)
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in turn and ours in turn:
            return turn, f'both "{theirs}" and "{ours}" are given, so which is meant is unclear: keep one of them'
        if theirs in turn:
            turn[ours] = turn.pop(theirs)
    role, content = turn.get("role"), turn.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type", part) if isinstance(part, dict) else part
                return turn, f"content must be text, but has a part of type {short(kind)}: remove it, as only parts of type text are read"
        turn["content"] = content = "".join(part["text"] for part in content)
    if isinstance(role, str):
        turn["role"] = OTHER_ROLES.get(role, role)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if turn.get("role") == "assistant" and calls:
        text, wrong = _calls(calls if isinstance(calls, list) else [calls])
        if wrong is None and isinstance(content or "", str):
            turn["content"] = f"{content}\n{text}" if content else text
        turn = {key: value for key, value in turn.items() if key not in ("tool_calls", "function_call")} | {"train": False}
        return turn, wrong
    weight = turn.get("weight") if turn.get("role") == "assistant" else None
    if weight not in (None, 0, 1):
        return turn, f'"weight" must be 0 (read, not trained on) or 1, not {short(weight)}'
    if role == "function_call" or weight == 0:
        turn["train"] = False
    return turn, None


def _calls(calls: list) -> tuple[str, str | None]:
    """Tool calls as text, one JSON object a line: chat templates differ in what they make of `tool_calls`, if anything."""
    lines = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return "", f"a tool call must be an object with the name of a function, not {short(call)}"
        arguments = function.get("arguments", {})  # OpenAI writes them as a string, which holds JSON if the model got it right
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        lines.append(f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": {arguments}}}')
    return "\n".join(lines), None


def _pair(row: dict, question: str, answer: str) -> tuple[list, str | None]:
    for name in (question, answer):
        if wrong := _no_text(row, name):
            return [], wrong
    if not isinstance(row.get("input") or "", str):
        return [], f'"input" must be a string, not {short(row["input"])}'
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        return [], f'"history" must be a list of [question, answer] pairs, not {short(history)}'
    messages = []
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered, "train": False}]
    asked = f"{row[question]}\n{row['input']}" if (row.get("input") or "").strip() else row[question]
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": row[answer]}], None


def check_dialogue(row: dict) -> str | None:
    """What is wrong with a row of the chat task, in one sentence; None if nothing is."""
    if wrong := check_turns(row):
        return wrong
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    if not answers:
        return "no assistant turn, so there is nothing to learn; a dialogue needs at least one"
    if not any(turn.get("train", True) for turn in answers):
        return 'every assistant turn has "train": false, so there is nothing to learn'
    return None


def check_turns(row: dict) -> str | None:
    """What is wrong with a dialogue of whoever speaks in it, in one sentence; None if nothing is."""
    if "messages" not in row:
        return (f'no column "messages" ({columns_of(row)}); a dialogue is {{"messages": [{{"role": "user", "content": "..."}}, ...]}}, '
                "or name a question and an answer, as in --columns prompt=QUESTION,response=ANSWER")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return '"messages" must be a list of turns that is not empty'
    for i, turn in enumerate(messages, start=1):
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            return f'turn {i} must be an object with "role" and "content", not {short(turn)}'
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            return f"turn {i}: role {short(role)} is unknown; use one of {', '.join(ROLES)}"
        if not isinstance(content, str):
            return f"turn {i}: content must be a string, not {short(content)}"
        if not content.isascii() and half_a_character(content):
            return f"turn {i}: content holds half a character (a lone surrogate, {short(content)}); write the whole one"
        if not content or content.isspace():
            return f"turn {i} ({role}) is empty; remove it or give it text"
        if role == "system" and i > 1:
            return f"turn {i}: a system turn may only come first"
        if "train" in turn and not isinstance(turn["train"], bool):
            return f'turn {i}: "train" must be true or false, not {short(turn["train"])}'
    return None


def check_classify(row: dict, label: str = "label", multi_label: bool = False) -> str | None:
    """What is wrong with a row of the classify task, in one sentence; None if nothing is. A dialogue needs a turn with the key `label`."""
    if "messages" in row:
        if wrong := check_turns(row):
            return wrong
        labelled = labelled_turns(row, label)
        if not labelled:
            keys = sorted({key for turn in row["messages"] for key in turn} - {"role", "content", "train", label})
            return (f'no turn has the key "{label}", so there is nothing to learn; --label names another key'
                    + (f" (the turns have {', '.join(keys)})" if keys else ""))
        return next((f"turn {i + 1}: {wrong}" for i, turn in labelled if (wrong := _no_labels(turn, label, multi_label))), None)
    if wrong := _missing(row, "text", label) or _no_text(row, "text"):
        return wrong
    if row.get("text_pair") is not None and not isinstance(row["text_pair"], str):
        return f'"text_pair" must be a string, not {short(row["text_pair"])}'
    return _no_labels(row, label, multi_label)


def labelled_turns(row: dict, label: str) -> list[tuple[int, dict]]:
    """(index, turn) of the turns of a dialogue that have a label; null is none, as data sets with fixed columns write it."""
    return [(i, turn) for i, turn in enumerate(row["messages"]) if turn.get(label) is not None]


def _no_labels(row: dict, label: str, multi_label: bool) -> str | None:
    """What is wrong with the label of a row or turn, or with its labels."""
    values = row[label] if multi_label else [row[label]]
    if not isinstance(values, list):
        return (f'"{label}" must be a list of labels, as --multi_label says, not {short(values)}: write ["one", "two"], in a cell of a '
                "table too")
    if not multi_label and isinstance(row[label], list):
        return f'"{label}" is a list, {short(row[label])}: where a row may have several labels, give --multi_label'
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int):
            return f'"{label}" must be a string or a whole number, not {short(value)}'
        if isinstance(value, str) and (wrong := _no_text({label: value}, label)):
            return wrong
    return f'"{label}" names a label twice: {short(values)}' if len(set(values)) < len(values) else None


def check_tag(row: dict) -> str | None:
    """What is wrong with a row of the tag task (`tokens` and `tags` of equal length), in one sentence; None if nothing is."""
    if wrong := _missing(row, "tokens", "tags"):
        return wrong
    for name in ("tokens", "tags"):
        if not isinstance(row[name], list) or not row[name]:
            return f'"{name}" must be a list of strings that is not empty, not {short(row[name])}'
        for i, one in enumerate(row[name], start=1):
            if isinstance(one, int) and name == "tags":
                return (f'entry {i} of "tags" is the number {short(one)}: write the name of the tag that it stands for, as in O, B-city, '
                        "I-city")
            if not isinstance(one, str):
                return f'entry {i} of "{name}" must be a string, not {short(one)}'
            if wrong := _no_text({name: one}, name):
                return f"{wrong} (entry {i})"
    if len(row["tokens"]) != len(row["tags"]):
        return f"{len(row['tokens'])} tokens but {len(row['tags'])} tags; each token needs one"
    return next((f"tag {short(tag)} (entry {i}) is not IOB2: write O, or B-type for a span's first word and I-type for the rest"
                 for i, tag in enumerate(row["tags"], start=1) if tag != "O" and not re.fullmatch(r"[BI]-\S+", tag)), None)


def check_translate(row: dict) -> str | None:
    """What is wrong with a row of the translate task, in one sentence; None if nothing is.

    Columns `source` and `target`; in place of the target, `refs` may hold several that are right.
    """
    if "refs" not in row:
        return _missing(row, "source", "target") or _no_text(row, "source") or _no_text(row, "target")
    if not isinstance(row["refs"], list) or not row["refs"]:
        return f'"refs" must be a list of targets that is not empty, not {short(row["refs"])}'
    wrong = next((wrong for text in row["refs"] if (wrong := _no_text({"refs": text}, "refs"))), None)
    return _missing(row, "source") or _no_text(row, "source") or wrong


def check_pretrain(row: dict) -> str | None:
    """What is wrong with a row of the pretrain task (`text`), in one sentence; None if nothing is."""
    return _missing(row, "text") or _no_text(row, "text")


class Odd(ValueError):
    """What JSON lets pass and no row may hold, in one sentence."""


def _decoder(odd) -> json.JSONDecoder:
    """JSON without what Python reads silently its own way; `odd` is handed an `Odd` of it, and says what stands in its place."""
    def unique(pairs):
        row = dict(pairs)
        if len(row) == len(pairs):
            return row
        names = [name for name, _ in pairs]
        return odd(Odd(f"the key {short(next(name for name in names if names.count(name) > 1))} stands twice in one object: keep one"))

    def number(text):
        value = float(text)
        return value if math.isfinite(value) else odd(Odd(f"the number {short(text)} is too large: write a smaller one, or null"))

    return json.JSONDecoder(object_pairs_hook=unique, parse_float=number,
                            parse_constant=lambda name: odd(Odd(f"{name} is no number of JSON: write null, or leave the key out")))


def _raise(odd: Odd):
    raise odd


_STRICT, _MARKING = _decoder(_raise), _decoder(lambda odd: odd)
DEEPEST = 100  # lists and objects in one another; Python itself gives up at some hundreds
ESCAPES = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")  # how JSON writes NUL and halves of characters


def parse(text: str) -> tuple[object, str | None]:
    """The value of a JSON text, and what is wrong with it, in one sentence."""
    value, wrong = _parsed(text, _STRICT)
    if wrong is None and (text.count("{") + text.count("[") > DEEPEST or "\\u" in text and ESCAPES.search(text)):
        wrong = odd(value)
    return value, wrong


def parse_rows(text: str) -> tuple[object, str | None]:
    """As `parse`, but for a text of many rows: what only one of them is wrong with stands in it as an `Odd`, for `odd` to find."""
    return _parsed(text, _MARKING)


def _parsed(text: str, decoder: json.JSONDecoder) -> tuple[object, str | None]:
    try:
        return decoder.decode(text), None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        broken = text.split("\n")[error.lineno - 1]
        return {}, f"broken JSON at {line}column {error.colno} ({error.msg}): {short(broken)}"
    except RecursionError:
        return {}, f"JSON nested too deeply: {short(text)}"
    except Odd as error:
        return {}, str(error)
    except ValueError as error:  # a number of more than 4,300 digits
        return {}, f"JSON that can't be read ({error}): {short(text)}"


def odd(value) -> str | None:
    """What no row may hold and this JSON value does, in one sentence; None if it holds nothing of the kind."""
    level, depth = [value], 0
    while level:
        below, depth = [], depth + 1
        for one in level:
            if isinstance(one, dict):
                below += [*one, *one.values()]
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str) and "\0" in one:
                return f"there is a NUL character (\\u0000) in {short(one)}: take it out"
            elif isinstance(one, str) and half_a_character(one):
                return f"there is half a character (a lone surrogate) in {short(one)}: write the whole one"
            elif isinstance(one, Odd):
                return str(one)
        level = below
        if level and depth > DEEPEST:
            return f"JSON nested too deeply (more than {DEEPEST} lists and objects in one another): {short(value)}"
    return None


def half_a_character(text: str) -> bool:
    """Whether `text` holds a lone surrogate, which JSON can write and nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def columns_of(row, within: str = "") -> str:
    """The names of a row's columns, for a sentence; with their column, the keys of the object that `within` (column.key) looks into."""
    column, dot, key = within.partition(".")
    if dot and isinstance(row, dict) and isinstance(row.get(column), dict):
        return columns_of({f"{column}.{name}": None for name in row[column]})
    names = [name if name.isprintable() and len(name) <= 40 else short(name) for name in list(row)[:12]]
    return f"columns: {', '.join(names) or 'none'}" + (f" and {len(row) - 12} more" if len(row) > 12 else "")


def short(value) -> str:
    """The beginning of a value as one printable line, for a sentence."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _missing(row: dict, *names: str) -> str | None:
    missing = [name for name in names if name not in row]
    if not missing:
        return None
    wrong = f'no column "{missing[0]}" ({columns_of(row)}); '
    for column, value in row.items():
        if isinstance(value, dict) and (keys := _keys_for(missing, value)):
            paths = ",".join(f"{name}={column}.{key}" for name, key in zip(missing, keys, strict=True))
            return (f'{wrong}"{column}" is an object of {", ".join(list(value)[:12])}: name what is in it, as in --columns {paths}'
                    + (" (or the other way round)" if keys != missing else ""))
    if len(row) < len(names):  # renaming can't make two of one
        return (f'{wrong}a row needs {" and ".join(names)}, and plain text gives each row the column text alone: save such rows as JSON '
                "Lines, CSV, TSV or Parquet")
    return f"{wrong}rename one, as in --columns {missing[0]}=COLUMN"


def _keys_for(names: list[str], within: dict) -> list[str]:
    """The keys of an object that could be the missing columns `names`: those of the same name; of a pair of texts in two languages, as
    WMT and OPUS write it, the first two in their order."""
    if all(name in within for name in names):
        return names
    return list(within)[:2] if names == ["source", "target"] and len(within) > 1 and all(type(v) is str for v in within.values()) else []


def _no_text(row: dict, name: str) -> str | None:
    value = row[name]
    if not isinstance(value, str):
        return f'"{name}" must be a string, not {short(value)}'
    if half_a_character(value):
        return f'"{name}" holds half a character (a lone surrogate, {short(value)}); write the whole one'
    return None if value.strip() else f'"{name}" must be a string with visible text, not {short(value)}; remove the row or give it text'
