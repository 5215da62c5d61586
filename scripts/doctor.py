"""Examine data before hours of training go into it:

    python scripts/doctor.py --data data/customer_service
    python scripts/doctor.py --data mylabels.csv --task classify --columns text=question,label=topic --json findings.json
    python scripts/doctor.py --data mydata --max_length 512 --show 3 --mask_pii mydata-masked

Lists every row that the training would refuse, with its number, what is wrong and the remedy. Of the others it says how many tokens they
have, what --max_length shortens or leaves out, exactly as the training will, and which value keeps 95, 99 and 100 % whole; how the labels
and languages are mixed; which rows repeat another, or stand in two splits; which hold personal data. Without a dev file, the dev rows are
those that the training holds out.

--show N prints rows as the model reads them, with what it is trained on in green, or in ⟦brackets⟧. --mask_pii OUT writes a copy in which
a placeholder such as [PHONE_1] stands for personal data, the same one for the same value throughout a row.

Exit status: 0; 1 with --strict if there is a warning; 2 for an error: a row or file that stops the training, rows in two splits.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, errors
from recipes.common.errors import UserError

MODELS = {"classify": "minilm", "tag": "minilm"}  # for the other tasks smollm2
LEARNED = {"classify": ("label",), "tag": ("tags",)}  # columns of a row; whatever --label names is called label by then
WHOLE = 10**9   # a --max_length that shortens nothing
SHOWN = 10      # refused rows of a file on the screen
UNKNOWN = 0.01  # share of unknown tokens from which a tokenizer does not fit the text


@dataclass
class Part:
    """A file of a source, or what was held out of it, with the numbers of its rows."""

    name: str
    rows: list[dict] = field(default_factory=list)
    numbers: list[int | str] = field(default_factory=list)
    refused: list[dict] = field(default_factory=list)  # {"row", "line" if it differs, "wrong"}
    notes: list[str] = field(default_factory=list)
    broken: str | None = None  # why the file can't be read, or not to its end


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    errors.install()
    try:
        return examine(parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str]):
    """The command line. Raises `UserError` for what can't be obeyed, before anything is read."""
    parser = args.Parser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", metavar="MODEL", help="whose tokenizer and chat template count: a Hub id, a folder or a bundled name "
                        "(default: smollm2; for classify and tag minilm)")
    args.add_fields(parser, args.SharedArguments, lambda f: f.name in args.READING)
    parser.add_argument("--seed", type=args.whole, default=args.SEED, metavar="N",
                        help="draws the dev rows, as in the training (default: %(default)s)")
    parser.add_argument("--threshold", type=args.not_negative, default=0.8, metavar="S",
                        help="rows are near duplicates if they share this much of their pieces, 0.1 to 1 (default: 0.8)")
    parser.add_argument("--show", type=args.whole, default=0, metavar="N", help="print N rows of each split as the model reads them")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto",
                        help="auto: colours if the screen is a terminal (default)")
    parser.add_argument("--mask_pii", metavar="OUT", help="write a copy without personal data: a file for a file, else a folder; must not "
                        "exist")
    parser.add_argument("--json", metavar="OUT", help="write everything found to this file as well")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there is a warning")
    options = parser.parse_args(argv)
    options.shared = args.SharedArguments(**{f.name: getattr(options, f.name) for f in fields(args.SharedArguments)
                                             if f.name in args.READING})
    options.shared.model = options.model or MODELS.get(options.task, "smollm2")
    args.check_task(options.shared, argv)
    if not 0 < options.dev_fraction < 1:
        raise UserError(f"--dev_fraction {options.dev_fraction} is no share: use a number between 0 and 1, such as 0.1")
    if not 0.1 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold:g}: use a number from 0.1 to 1")
    if options.json and (Path(options.json).is_dir() or not Path(options.json).absolute().parent.is_dir()):
        raise UserError(f"--json {options.json}: name a file in a folder that exists")
    if options.mask_pii and Path(options.mask_pii).exists():
        raise UserError(f"--mask_pii {options.mask_pii} exists already: name another")
    if options.mask_pii and len(options.data) > 1:
        raise UserError("--mask_pii copies one source: run it for each --data by itself")
    if options.mask_pii and Path(options.data[0]).is_file() and not options.mask_pii.endswith(".jsonl"):
        raise UserError(f"--mask_pii {options.mask_pii}: the copy of a file is JSON Lines, so name a .jsonl file")
    options.colour = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
    return options


def examine(options) -> int:
    """The whole examination. Returns the exit status, raises `UserError`."""
    from recipes.common import data, doctor, models, tasks

    shared, kind = options.shared, tasks.module(options.task)
    renames, sources = data.parse_columns(shared.columns), data.sources(shared.data)
    found = data.find_all(shared.data, split=shared.split)
    model = models.resolve(shared.model, shared.fallback_model, weights=False)
    tasks.check_cell(shared.task, model, args.Method())
    sources = [{split: read(file, kind.check(shared), shared.columns, renames) for split, file in files.items()} for files in found]
    files = [(split, part) for source in sources for split, part in source.items()]
    findings = [finding for split, part in files for finding in tell(split, part, shared.on_bad_row)]
    for sentence in data.tell_not_read(data.not_read(shared.data, split=shared.split)):
        print(f"note: {sentence}")
    hold_out(sources, options)
    splits = {split: joined([source[split] for source in sources if split in source]) for split in data.SPLITS}
    splits = {split: part for split, part in splits.items() if part.rows}
    summary, task, encoded = {}, None, {}
    try:
        task, encoded, more = tokenized(splits, shared, kind, model)
        findings += more
    except UserError as error:
        findings.append(doctor.Finding("error", "stops", f"the training would stop: {error}", [], 0, ""))
    print(f"model: {model.used}, of which only the tokenizer is used\n")
    if encoded:
        summary, findings = doctor.examine({name: split.summary for name, split in encoded.items()}, task.max_length, options.threshold,
                                           found=findings)
        print(doctor.report(summary, findings, options.colour))
    else:
        print("\n".join(doctor.verdict(findings, options.colour)))
    for name, split in encoded.items():
        show(name, split, task, options)
    if options.mask_pii:
        mask(Path(options.mask_pii), files, Path(shared.data[0]).is_file())
    severities = {finding.severity for finding in findings}
    status = 2 if "error" in severities else int(options.strict and "warning" in severities)
    if options.json:
        record = {"data": shared.data, "task": shared.task, "model": model.used, "exit_status": status, "files": [
            {"name": part.name, "split": split, "read": len(part.rows) + len(part.refused), "kept": len(part.rows),
             "refused": part.refused, "notes": part.notes, "broken": part.broken} for split, part in files],
            **summary, "findings": doctor.as_json(findings)}
        write(Path(options.json), "--json", lambda path: path.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", "utf-8"))
        print(f"wrote {options.json}")
    return status


def read(file, check, columns: str | None, renames: dict) -> Part:
    """All rows of a file (a path, or a split of a Hub data set) that keep the column contract, and what is wrong with the others."""
    from recipes.common import data, formats

    part = Part(str(file) if isinstance(file, Path) else file.name)
    try:
        file = file if isinstance(file, formats.File) else formats.identify(file, renames)
        part.notes += file.notes
        for record in data.records(file, check, columns):
            number = f"{record.shard}:{record.number}" if record.shard else record.number
            if record.wrong is None:
                part.rows.append(record.row)
                part.numbers.append(number)
            else:
                part.refused.append({"row": number, **({"line": record.line} if record.line else {}), "wrong": record.wrong})
    except UserError as error:
        part.broken = str(error)
    return part


def tell(split: str, part: Part, on_bad_row: str) -> list:
    """Print what was read of a file. Returns the findings."""
    from recipes.common.doctor import Finding

    kept, refused = len(part.rows), len(part.refused)
    print(f"{split}: {kept + refused:,} rows read, {kept:,} kept, {refused:,} refused ({part.name})")
    for note in part.notes:
        print(f"  note: {note}")
    for bad in part.refused[:SHOWN]:
        print(f"  row {bad['row']}" + (f" (line {bad['line']})" if "line" in bad else "") + f": {bad['wrong']}")
    if refused > SHOWN:
        print(f"  ... and {refused - SHOWN:,} more; --json OUT lists all")
    findings = []
    if part.broken:
        findings.append(Finding("error", "unreadable", f"1 file can't be read, or not to its end: {part.broken}", [], 1, split))
    elif not kept + refused:
        findings.append(Finding("error", "unreadable", f"0 rows are in {part.name}", [], 0, split))
    if refused:
        severity = "error" if on_bad_row == "stop" else "warning"
        findings.append(Finding(severity, "bad-row", f"{refused} of {kept + refused} rows in {part.name} break the column contract",
                                [bad["row"] for bad in part.refused], refused, split))
    return findings


def hold_out(sources: list[dict[str, Part]], options) -> None:
    """Give a dev split to the sources that have none: the rows that the training holds out (data.load)."""
    from recipes.common import data

    without = [source for source in sources if "dev" not in source and "train" in source]
    size = sum(len(source["train"].rows) for source in without)
    if size < 2:
        return
    chosen, start = data.held_out(size, options.dev_fraction, options.seed), 0
    for source in without:
        train = source["train"]
        taken = [start + i in chosen for i in range(len(train.rows))]
        start += len(taken)
        source["dev"], source["train"] = (
            Part(train.name, [row for row, out in zip(train.rows, taken, strict=True) if out is side],
                 [number for number, out in zip(train.numbers, taken, strict=True) if out is side]) for side in (True, False))
    print(f"dev: {len(chosen):,} of the train rows are held out (--dev_fraction {options.dev_fraction:g}, --seed {options.seed})")


def joined(parts: list[Part]) -> Part:
    """The rows of several files, whose numbers then name the file as well."""
    parts = [part for part in parts if part.rows]
    if len(parts) == 1:
        return parts[0]
    return Part("", [row for part in parts for row in part.rows], [f"{part.name}:{number}" for part in parts for number in part.numbers])


@dataclass
class Encoded:
    """A split as the task reads it."""

    summary: object  # doctor.Split
    items: list[dict]  # the task's rows
    numbers: list[int | str]
    features: list[dict | None]  # what is trained on; None for an item that is left out
    lengths: list[int]


def tokenized(splits: dict[str, Part], shared, kind, model) -> tuple[object, dict[str, Encoded], list]:
    """The task, what its own `encode` makes of each split, and findings. Raises `UserError` for what stops every training."""
    from recipes.common import tasks

    items = {name: [kind.rows([row], shared) for row in part.rows] for name, part in splits.items()}
    flat = {name: [item for own in rows for item in own] for name, rows in items.items()}
    train = flat.get("train") or next(iter(flat.values()), [])  # without train rows, the others say which labels there are
    if not train:
        raise UserError("there is no row to train on")
    task = tasks.without_data(shared, model, train)
    for note in task.report.get("notes", []):
        print(f"note: {note}")
    whole = kind.make(replace(shared, max_length=WHOLE), model, task.tokenizer, kind.facts(train, shared))
    encoded, findings = {}, []
    for name, part in splits.items():
        numbers = [number for number, own in zip(part.numbers, items[name], strict=True) for _ in own]
        encoded[name], more = encode(name, flat[name], numbers, task, whole, shared.on_bad_row)
        findings += more + flawed(name, encoded[name], part, task)
        if any("messages" in row and "messages" not in item for row, own in zip(part.rows, items[name], strict=True) for item in own):
            left = set(encoded[name].numbers)
            rows = [(number, row) for number, row in zip(part.numbers, part.rows, strict=True) if number in left]
            encoded[name].summary = replace(encoded[name].summary, rows=[row for _, row in rows], numbers=[number for number, _ in rows],
                                            items=encoded[name].items, item_numbers=encoded[name].numbers, unit="labelled turns")
    return task, encoded, findings


def encode(name: str, items: list[dict], numbers: list, task, whole, on_bad_row: str) -> tuple[Encoded, list]:
    """A split as `task` reads it, and findings; `whole` is the same task without a limit, which says how long the items are in full."""
    from recipes.common.doctor import Finding, Split

    training, findings = name == "train", []
    features, counts = whole.encode(items, name, "skip", training)
    for sentence in counts["sentences"]:
        print(f"{name}: {sentence}")
    if refused := counts["refused"]:
        sentences = {number: sentence.partition(": ")[2] for number, sentence in refused.items()}  # they name the item, not the file's row
        for number in list(sentences)[:SHOWN]:
            print(f"{name}, row {numbers[number - 1]}: {sentences[number]}")
        findings.append(Finding("error" if on_bad_row == "stop" else "warning", "refused-row", (
            f"{len(refused)} of {len(items)} {counts['unit']} in {name} can't be trained on with this model or these labels"),
            list(dict.fromkeys(numbers[number - 1] for number in refused)), len(refused), name))
    gone = refused.keys() | set(counts["left_out"])
    items, numbers = ([entry for i, entry in enumerate(entries, start=1) if i not in gone] for entries in (items, numbers))
    lengths = [max(len(f["input_ids"]), len(f["labels"]) if task.peft_type == "SEQ_2_SEQ_LM" else 0) for f in features]
    kept = dict(enumerate(features, start=1))
    if max(lengths) > task.max_length:
        try:
            features, cut = task.encode(items, name, "skip", training)
            kept = dict(zip([i for i in kept if i not in set(cut["left_out"])], features, strict=True))
        except UserError as error:
            kept = {}
            findings.append(Finding("error", "stops", f"the training would stop: {error}", [], 0, name))
    found = [kept.get(i) for i in range(1, len(items) + 1)]
    split = Split(items, numbers, lengths, [trained_on(feature, task) for feature in found], unit=counts["unit"], trained=counts["items"],
                  learned=LEARNED.get(task.name, ()))
    return Encoded(split, items, numbers, found, lengths), findings


def trained_on(feature: dict | None, task) -> int | None:
    """How many tokens, words or labels of an item are trained on; None for one that is out of scope."""
    from recipes.common.chat import IGNORE

    if feature is None:
        return 0
    labels = feature["labels"]
    if task.peft_type == "SEQ_CLS":
        return None if labels == IGNORE else 1
    return sum(label != IGNORE for label in (labels[1:] if task.peft_type == "CAUSAL_LM" else labels))  # the first predicts nothing


def flawed(name: str, encoded: Encoded, part: Part, task) -> list:
    """Findings about the tokens: turns that do not end, a first token that stands twice, special tokens in the text, unknown ones."""
    from recipes.common import chat, doctor

    rows = {"no-end": [], "double-bos": [], "special-token": []}
    if task.name in ("chat", "translate") and task.peft_type == "CAUSAL_LM":
        end, bos = chat.end_of_turn_id(task.tokenizer), task.tokenizer.bos_token_id
        for number, feature in zip(encoded.numbers, encoded.features, strict=True):
            for code in doctor.flaws(feature["input_ids"], feature["labels"], end, bos) if feature else ():
                rows[code].append(number)
    special = [token.content for token in task.tokenizer.added_tokens_decoder.values() if token.special]
    there = Counter()
    for number, row in zip(part.numbers, part.rows, strict=True):
        held = {token for text in doctor.texts(row) for token in special if token in text}
        rows["special-token"] += [number] if held else []
        there.update(held)
    sentences = {"no-end": "hold an answer whose end is not trained on", "double-bos": "begin with the first token twice",
                 "special-token": f"hold a special token of the model in their text ({', '.join(there)})"}
    findings = [doctor.Finding("warning" if code == "special-token" else "error", code, f"{len(found)} rows in {name} {sentences[code]}",
                               found, len(found), name) for code, found in rows.items() if found]
    unk = task.tokenizer.unk_token_id if task.tokenizer.unk_token != task.tokenizer.eos_token else None  # GPT-2 names one for both
    unknown = [feature["input_ids"].count(unk) if feature else 0 for feature in encoded.features]
    share = sum(unknown) / max(1, sum(len(feature["input_ids"]) for feature in encoded.features if feature))
    if share >= UNKNOWN:
        found = list(dict.fromkeys(number for number, n in zip(encoded.numbers, unknown, strict=True) if n))
        findings.append(doctor.Finding("warning", "unknown-token", (
            f"{share:.0%} of the tokens in {name} stand for characters that the tokenizer does not know"), found, len(found), name))
    return findings


def show(name: str, encoded: Encoded, task, options) -> None:
    """Print some items of a split as the model reads them, evenly from the first to the last."""
    from recipes.common import doctor, evaluation, tasks

    for i in evaluation.spread(len(encoded.items), options.show):
        feature, item = encoded.features[i], encoded.items[i]
        length = encoded.lengths[i]
        fate = ": left out" if feature is None else f", shortened to {len(feature['input_ids'])}" if length > task.max_length else ""
        print(f"\n--- {name}, row {encoded.numbers[i]} ({length} tokens{fate}) ---")
        if feature is None:
            continue
        ids, labels = feature["input_ids"], feature["labels"]
        if task.peft_type in ("CAUSAL_LM", "TOKEN_CLS"):
            print(doctor.rendered(task.tokenizer, ids, labels, options.colour).rstrip("\n"))
        else:
            print(task.tokenizer.decode(ids))
        if task.peft_type == "TOKEN_CLS":
            print(f"-> {tasks.module('tag').shown(item['tokens'], item['tags'])}")
        if task.peft_type == "SEQ_2_SEQ_LM":
            print(f"-> {doctor.rendered(task.tokenizer, labels, labels, options.colour)}")
        if task.peft_type == "SEQ_CLS":
            print(f"-> {doctor.marked(json.dumps(item['label'], ensure_ascii=False), options.colour)}")


def mask(out: Path, files: list[tuple[str, Part]], single: bool) -> None:
    """Write the copy without personal data: `single` a file, else a folder with a file a split. Raises `UserError`."""
    from recipes.common import doctor, pii

    if broken := next((part.broken for _, part in files if part.broken), None):
        raise UserError(f"--mask_pii {out} is not written, as the data can't be read whole: {broken}")
    texts, counts, left, elsewhere = {}, Counter(), [], Counter()
    for split, part in files:
        lines = []
        for number, row in zip(part.numbers, part.rows, strict=True):
            masked, own = pii.mask_row(row)
            counts.update(own)
            left += [f"{split} {number}"] if any(pii.find(text) for text in doctor.texts(masked)) else []
            elsewhere.update({column for column, text in others(row) if any(found.kind != "ORDER" for found in pii.find(text))})
            lines.append(json.dumps(masked, ensure_ascii=False) + "\n")
        texts[split] = "".join(lines)

    def fill(path: Path) -> None:
        if single:
            path.write_text(texts["train"], "utf-8", newline="\n")
            return
        path.mkdir()
        for split, text in texts.items():
            (path / f"{split}.jsonl").write_text(text, "utf-8", newline="\n")

    write(out, "--mask_pii", fill)
    print(f"\nwrote {out}: {sum(len(part.rows) for _, part in files):,} rows; "
          + (", ".join(f"{counts[kind]:,} {doctor.PERSONAL[kind]}" for kind in pii.KINDS if counts[kind]) or "nothing") + " masked")
    if refused := sum(len(part.refused) for _, part in files):
        print(f"  {refused:,} refused rows are not in it")
    if left:
        print(f"  {len(left)} rows still hold some, spread over several tokens: {', '.join(left[:SHOWN])}{', ...' * (len(left) > SHOWN)}")
    for column, n in elsewhere.items():
        print(f'  "{column}" is copied as it is, although {n} rows hold personal data in it; no model reads it')


def others(row: dict):
    """(name, text) of the strings in a row and its turns that no model reads."""
    for entry in (row, *row.get("messages", ())):
        for name, value in entry.items():
            if isinstance(value, str) and name not in ("content", "role", "text", "text_pair", "source", "target", "id"):
                yield name, value


def write(out: Path, flag: str, fill) -> None:
    """Let `fill` write a file or folder beside `out`, then give it that name. Raises `UserError`."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".doctor-") as work:
            fill(Path(work) / "new")
            os.replace(Path(work) / "new", out)
    except OSError as error:
        raise UserError(f"{flag} {out} can't be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
