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

Exit status: 0; 1 with --strict if there is a warning; 2 for an error, which is what would stop the training, or this examination.
"""

import argparse
import functools
import json
import operator
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

# Python puts this folder first on the path, where evaluate.py would hide the package `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from recipes.common import args, errors
from recipes.common.errors import UserError
from recipes.common.wording import counted

MODELS = {"classify": "minilm", "tag": "minilm"}  # for the other tasks smollm2
SHOWN = 10      # refused rows of a file on the screen
CUT = re.compile(r"[\w@.+ -]*[0-9@][\w@.+ -]*\.\.\.(?=['\"])", re.A)  # where a quotation (shapes.short) ends in a number or an address


@dataclass
class Part:
    """A file of a source, or what was held out of it, with the numbers of its rows."""

    name: str
    rows: Sequence[dict] = ()  # on disk (disk.Stored)
    numbers: list[int | str] = field(default_factory=list)
    refused: list[dict] = field(default_factory=list)  # {"row", "line" if it differs, "wrong"}
    notes: list[str] = field(default_factory=list)
    broken: str | None = None  # why the file can't be read, or not to its end
    copies: int = 0  # rows that scripts/augment.py made of others


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return errors.status_of(lambda: examine(parse(sys.argv[1:] if argv is None else argv)))


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
                        help="auto: colours if the screen is a terminal and NO_COLOR is not set (default)")
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
    for flag, out in (("--json", options.json), ("--mask_pii", options.mask_pii)):
        if out:
            check_out(Path(out), flag)
    if options.json and options.mask_pii and Path(options.json).absolute() == Path(options.mask_pii).absolute():
        raise UserError(f"--json and --mask_pii both name {options.json}: name two files")
    if options.mask_pii and len(options.data) > 1:
        raise UserError("--mask_pii copies one source: run it for each --data by itself")
    if options.mask_pii and Path(options.data[0]).is_file() and not options.mask_pii.endswith(".jsonl"):
        raise UserError(f"--mask_pii {options.mask_pii}: the copy of a file is JSON Lines, so name a .jsonl file")
    options.colour = options.color == "always" or (options.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    return options


def check_out(out: Path, flag: str) -> None:
    """Raise `UserError` unless a new file or folder can be written under this name; an older file of findings may be replaced."""
    try:
        if flag == "--json" and out.exists() and not out.is_file():
            raise UserError(f"--json {out} is there already and is no file: name a file")
        if flag == "--mask_pii" and out.exists():
            raise UserError(f"--mask_pii {out} exists already: name another")
        if flag == "--json" and not out.absolute().parent.is_dir():
            raise UserError(f"--json {out}: name a file in a folder that exists")
        tempfile.TemporaryFile(dir=next(folder for folder in out.absolute().parents if folder.exists())).close()
    except OSError as error:
        raise UserError(f"{flag} {out} can't be written ({error.strerror}): name another") from error


def check_none_of_data(out: Path, found: list[dict]) -> None:
    """Raise `UserError` if --json would replace a file of the data, or would be taken for one in their folder."""
    from recipes.common import data, formats

    files = [path for files in found for file in files.values() for path in data.paths(file)]
    if any(out.exists() and out.samefile(file) for file in files):
        raise UserError(f"--json {out} is a file of --data, and would replace it: name another")
    split = next((split for split, names in data.SPLITS.items() if out.name.lower().partition(".")[0] in names), None)
    if split and formats.suggested(out) and any(file.parent.samefile(out.absolute().parent) for file in files):
        raise UserError(f"--json {out} would be taken for {split} rows in the folder of --data: name another")


def private(record):
    """A record for --json without the personal data of the rows that it quotes: in the complaints about them, and as labels."""
    from recipes.common import pii

    if isinstance(record, str):
        return CUT.sub("...", pii.mask_texts([record])[0][0])  # what is quoted is cut, and half a number is still one
    if isinstance(record, dict):
        kept = ("row", "of_row", "rows", "groups")  # numbers, with the file's name if there are several
        return {name: value if name in kept else private(value)
                for name, value in zip(pii.mask_texts(record)[0], record.values(), strict=True)}
    return [private(entry) for entry in record] if isinstance(record, list) else record


def examine(options) -> int:
    """The whole examination. Returns the exit status, raises `UserError`."""
    from recipes.common import data, deadline, doctor, doctor_tokens, models, tasks

    deadline.limit = options.data_timeout
    shared, kind = options.shared, tasks.module(options.task)
    renames, weights = data.parse_columns(shared.columns), [source.weight for source in data.sources(shared.data)]
    if weights[0] is not None:
        print("note: the weights of --data are left aside: each row is looked at once, however often the training reads it")
    found = data.find_all(shared.data, split=shared.split)
    if options.json:
        check_none_of_data(Path(options.json), found)
    model = models.resolve(shared.model, shared.fallback_model, weights=False)
    tasks.check_cell(shared.task, model, args.Method())
    sources = [{split: read(file, kind.check(shared), shared.columns, renames) for split, file in files.items()} for files in found]
    files = [(split, part) for source in sources for split, part in source.items()]
    findings = [finding for split, part in files for finding in tell(split, part, shared.on_bad_row)]
    findings += [doctor.Finding("error", "stops", f"the training would stop: {name} has no train file, such as train.jsonl", [], 0, "")
                 for name, source in zip(shared.data, sources, strict=True) if "train" not in source]
    for sentence in data.tell_not_read(data.not_read(shared.data, split=shared.split)):
        print(f"note: {sentence}")
    findings += hold_out(sources, options)
    train = [(source["train"].name, len(source["train"].rows)) for source in sources if "train" in source]
    if weights[0] is not None and len(train) == len(sources) and all(finding.severity != "error" for finding in findings):
        try:
            data.drawn(train, weights)
        except UserError as error:
            findings.append(doctor.Finding("error", "not-drawn", f"the training would stop: {error}", [], 0, "train"))
    splits = {split: joined([source[split] for source in sources if split in source]) for split in data.SPLITS}
    splits = {split: part for split, part in splits.items() if part.rows}
    summary, task, encoded = {}, None, {}
    try:
        task, encoded, more = doctor_tokens.tokenized(splits, shared, kind, model)
        findings += more
    except UserError as error:
        findings.append(doctor_tokens.stops("", error))
    print(f"model: {model.used}, of which only the tokenizer is used\n")
    if encoded:
        summary, findings = doctor.examine({name: split.summary for name, split in encoded.items()}, task.max_length, options.threshold,
                                           found=findings)
        print(doctor.report(summary, findings, options.colour, shutil.get_terminal_size().columns))
    else:
        print("\n".join(doctor.verdict(findings, options.colour)))
    for name, split in encoded.items():
        doctor_tokens.show(name, split, task, options)
    if options.mask_pii:
        mask(Path(options.mask_pii), files, Path(shared.data[0]).is_file(), shared)
    severities = {finding.severity for finding in findings}
    status = 2 if "error" in severities else int(options.strict and "warning" in severities)
    if options.json:
        record = {"data": shared.data, "task": shared.task, "model": model.used, "exit_status": status, "files": [
            {"name": part.name, "split": split, "read": len(part.rows) + len(part.refused), "kept": len(part.rows),
             **private({"refused": part.refused, "notes": part.notes, "broken": part.broken})} for split, part in files],
            **private({**summary, "findings": doctor.as_json(findings)})}
        write(Path(options.json), "--json", lambda path: path.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", "utf-8"))
        print(f"wrote {options.json}")
    return status


def read(file, check, columns: str | None, renames: dict) -> Part:
    """All rows of a file (a path, or a split of a Hub data set) that keep the column contract, and what is wrong with the others."""
    from recipes.common import data, deadline, disk, formats

    part = Part(str(file) if isinstance(file, Path) else file.name)

    def good() -> Iterator[dict]:
        try:
            known = file if isinstance(file, formats.File) else formats.identify(file, renames)
            part.notes += known.notes
            for record in deadline.timed(data.records(known, check, columns), part.name):
                number = f"{record.shard}:{record.number}" if record.shard else record.number
                if record.wrong is None:
                    part.numbers.append(number)
                    part.copies += data.is_copy(record.row)
                    yield record.row
                else:
                    part.refused.append({"row": number, **({"line": record.line} if record.line else {}), "wrong": record.wrong})
        except UserError as error:
            part.broken = str(error)

    part.rows = disk.store(good())
    return part


def tell(split: str, part: Part, on_bad_row: str) -> list:
    """Print what was read of a file. Returns the findings."""
    from recipes.common.doctor import Finding, visible

    kept, refused = len(part.rows), len(part.refused)
    print(visible(f"{split}: {counted(kept + refused, 'rows')} read, {kept:,} kept, {refused:,} refused ({part.name})"))
    for note in part.notes:
        print(visible(f"  note: {note}"))
    for bad in part.refused[:SHOWN]:
        print(visible(f"  row {bad['row']}" + (f" (line {bad['line']})" if "line" in bad else "") + f": {bad['wrong']}"))
    if refused > SHOWN:
        print(f"  ... and {refused - SHOWN:,} more; --json OUT lists all")
    findings = []
    if part.broken:
        findings.append(Finding("error", "unreadable", f"1 file can't be read, or not to its end: {part.broken}", [], 1, split))
    elif not kept and (on_bad_row == "skip" or not refused):
        usable = " that can be used" if refused else ""
        findings.append(Finding("error", "unreadable", f"0 rows{usable} are in {part.name}, and the training would stop", [], 0, split))
    if refused:
        severity = "error" if on_bad_row == "stop" else "warning"
        findings.append(Finding(severity, "bad-row", f"{refused} of {kept + refused} rows in {part.name} break the column contract",
                                [bad["row"] for bad in part.refused], refused, split))
    return findings


def hold_out(sources: list[dict[str, Part]], options) -> list:
    """Give a dev split to the sources that have none: the rows that the training holds out (data.load). Returns the findings."""
    from recipes.common import data
    from recipes.common.doctor import Finding

    without = [source for source in sources if "dev" not in source and "train" in source]  # a source without train rows is told of
    size = sum(len(source["train"].rows) for source in without)
    if size == 1 and without == sources:
        return [Finding("error", "stops", f"the training would stop: {without[0]['train'].name} has one row that can be used, and needs at "
                        "least two, as one is held out as dev", [], 1, "train")]
    if size < 2:
        return []
    findings = []
    for source in without:
        try:
            data.check_no_copies(source["train"].name, source["train"].copies)
        except UserError as error:
            findings.append(Finding("error", "not-drawn", f"the training would stop: {error}", [], 0, "train"))
    chosen, start = data.held_out(size, options.dev_fraction, options.seed), 0
    for source in without:
        train = source["train"]
        taken = [start + i in chosen for i in range(len(train.rows))]
        start += len(taken)
        source["dev"], source["train"] = (
            Part(train.name, train.rows.take([i for i, out in enumerate(taken) if out is side]),
                 [number for number, out in zip(train.numbers, taken, strict=True) if out is side]) for side in (True, False))
    print(f"dev: {len(chosen):,} of the train rows are held out (--dev_fraction {options.dev_fraction:g}, --seed {options.seed})")
    return findings


def joined(parts: list[Part]) -> Part:
    """The rows of several files, whose numbers then name the file as well."""
    parts = [part for part in parts if part.rows]
    if len(parts) == 1:
        return parts[0]
    return Part("", functools.reduce(operator.add, (part.rows for part in parts)) if parts else (),
                [f"{part.name}:{number}" for part in parts for number in part.numbers])


def mask(out: Path, files: list[tuple[str, Part]], single: bool, shared) -> None:
    """Write the copy without personal data: `single` a file, else a folder with a file a split. Raises `UserError`."""
    from recipes.common import disk, doctor, pii

    if broken := next((part.broken for _, part in files if part.broken), None):
        raise UserError(f"--mask_pii {out} is not written, as the data can't be read whole: {broken}")
    counts, spread, left, stay = Counter(), [], {}, {*pii.STAY, shared.label}

    def masked(split: str, part: Part) -> Iterator[str]:
        for number, row in zip(part.numbers, part.rows, strict=True):
            new, own = pii.mask_row(row, stay=stay)
            counts.update(own)
            spread.extend([f"{split} {number}"] if any(pii.find(text) for text in doctor.texts(new)) else [])
            for column in {column for column, text in pii.left_as_they_are(row, stay) if any(
                    found.kind != "ORDER" for found in pii.find(text))}:
                left.setdefault(column, []).append(f"{split} {number}")
            yield json.dumps(new, ensure_ascii=False, default=str) + "\n"

    def fill(path: Path) -> None:
        if not single:
            path.mkdir()
        for split, part in files:
            with (path if single else path / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(masked(split, part))
            disk.forget()

    write(out, "--mask_pii", fill)
    print(f"\nwrote {out}: {counted(sum(len(part.rows) for _, part in files), 'rows')}; "
          "masked: " + (", ".join(f"{doctor.PERSONAL[kind]} {counts[kind]:,}" for kind in pii.KINDS if counts[kind]) or "nothing"))
    if refused := sum(len(part.refused) for _, part in files):
        print(f"  {counted(refused, 'refused row is|refused rows are')} not in it")
    if shared.columns:
        print("  its columns have their new names: leave --columns out where it is read")
    if spread:
        print(f"  {counted(len(spread), 'row still holds|rows still hold')} some, spread over several tokens: {some(spread)}")
    for column, rows in left.items():
        name = doctor.visible(json.dumps(column, ensure_ascii=False))
        print(f"  {name} is copied as it is, although {counted(len(rows), 'row holds|rows hold')} personal data in it, as a label, an id, "
              f"a number or a name: {some(rows)}")


def some(rows: list[str]) -> str:
    return ", ".join(rows[:SHOWN]) + ", ..." * (len(rows) > SHOWN)


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
