"""Bytes -> records: what a file is, by its content, and its records one at a time.

`identify` reads a file once to the end: is it whole, in which encoding, what is its hash. So a file that is cut or garbled is refused
before its first record is handed out, and `records` can stream the rest in bounded memory (a JSON array alone is held whole).
"""

import codecs
import csv
import gzip
import hashlib
import io
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.common import shapes
from recipes.common.deadline import deadline, timed
from recipes.common.errors import UserError
from recipes.common.shapes import short

# What a name suggests. The content decides; the name settles what the content leaves open, and says what a broken file was meant to be.
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".parquet": "parquet"}
CHUNK = 1 << 20  # bytes decoded at a time
LOOKED_AT = 1 << 30  # bytes of a stream that are looked through for the first that is not ASCII, which tells the encoding
HEAD = 4096  # bytes that show UTF-16 by its NULs
csv.field_size_limit(2**31 - 1)  # Python's own limit of 131,072 characters is shorter than a long dialogue

# The most frequent characters of Chinese prose and chat: about 120 of the 6,763 of GB 2312, and yet a third or more of most texts.
FREQUENT = set("的一是不了我在有人这他们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学么之都好看起"
               "发当没成只如事把还用第样道想作种开美总从无情己面最女但现前些所同日手又行意动您请谢吗吧呢帮需客服什订单给怎知很问电话")


class Record(NamedTuple):
    """One record of a file: its row, or what is wrong with it. Numbers count from 1."""

    number: int
    row: dict
    wrong: str | None = None
    line: int | None = None  # where it begins, if that is not the number
    shard: str | None = None  # the name of its file, where several hold a split

    @property
    def where(self) -> str:
        return (f"{self.shard}, " if self.shard else "") + f"row {self.number}" + (f" (line {self.line})" if self.line else "")


class Shards(NamedTuple):
    """The files that hold a split together, in order."""

    name: str
    paths: list[Path]

    def __str__(self):
        return self.name


@dataclass
class File:
    """What `identify` found out about a file (or data.py about a split of a Hub data set)."""

    name: str
    format: str  # one of SUFFIXES' values, or "hub"
    sha256: str
    encoding: str = "utf-8"
    gzipped: bool = False
    delimiter: str = ","
    columns: list[str] | None = None  # where they are stated once for all rows
    notes: list[str] = field(default_factory=list)
    hub: Callable[[], Iterator[dict]] | None = None  # the rows of such a split
    shards: list["File"] = field(default_factory=list)  # of one format; their rows are the file's


def identify(path: Path | Shards, names: Iterable[str] = (), whole: bool = True) -> File:
    """What `path` is. `names` are columns that the user expects, beside those of shapes.NAMES. Raises `UserError`.

    Without `whole`, there is no hash, and the encoding is told from the first megabyte that is not ASCII, if it is within LOOKED_AT.
    """
    if isinstance(path, Shards):
        return _together(path, [identify(shard, names, whole) for shard in path.paths])
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a pipe or a device, and a file is read more than once: write it to a file first, as in "
                        "`zcat rows.gz > train.jsonl`")
    try:
        with path.open("rb") as stream:
            file = File(str(path), "text", _digest(stream, path) if whole else "streamed")
            stream.seek(0)
            file.gzipped = stream.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    if path.suffix.lower() == ".gz" and not file.gzipped:
        raise UserError(f"{path} is no gzip file, although its name ends in .gz: make it again, or rename it")
    hint = suggested(path)
    with _bytes(file) as stream:
        start = stream.read(HEAD)
    if start.startswith(b"PAR1") or hint == "parquet":
        file.format = "parquet"
        with _parquet(file) as table:
            file.columns = _unique(table.schema_arrow.names, file.name)
        return file
    if start.startswith(b"PK\x03\x04"):
        raise UserError(f"{path} is a zip archive or an Excel workbook: unpack it, or save the sheet as CSV in UTF-8")
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise UserError(f"{path} is UTF-32 by its byte order mark, which is not read: save the file as UTF-8")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        file.encoding = "utf-16-le" if start.startswith(codecs.BOM_UTF16_LE) else "utf-16-be"
    elif _nuls_alternate(start):
        raise UserError(f"{path} looks like UTF-16 without its byte order mark, so it can't be read for certain: save it as UTF-8")
    if whole:
        _find_encoding(file, hint)
    else:
        _glance_at_encoding(file)
    with _text(file, errors="replace") as stream:  # a byte that is wrong is told with its row by whoever reads so far
        lines = (line for line in stream if line.strip())
        first, second = next(lines, ""), next(lines, None)
    file.format = _format(first, second, hint, names)
    if file.format == "csv":
        file.delimiter = max(",;\t", key=lambda d: _names_in(first, d, names))
        file.columns = _header(file, names)
    if hint and file.format != hint and first:
        file.notes.append(f"{path} is read as {file.format}, which its content is, whatever its name says")
    return file


def _together(shards: Shards, files: list[File]) -> File:
    other = next((file for file in files if file.format != files[0].format), None)
    if other:
        raise UserError(f"{shards.name}: {files[0].name} is {files[0].format}, but {other.name} is {other.format}: the files of a split "
                        "must be of one format, so save them alike or move one away")
    sha256 = "streamed" if files[0].sha256 == "streamed" else hashlib.sha256("\n".join(file.sha256 for file in files).encode()).hexdigest()
    return File(shards.name, files[0].format, sha256, gzipped=any(file.gzipped for file in files),
                notes=[note for file in files for note in file.notes], shards=files)


def records(file: File) -> Iterator[Record]:
    """The records of a file, in order. Raises `UserError` where the records that follow can't be told apart any more."""
    kinds = {"jsonl": _jsonl, "json": _json, "csv": _csv, "text": _lines, "parquet": _table, "hub": _hub}
    return kinds[file.format](file)


def suggested(path: Path) -> str | None:
    """The format that a file's name suggests, if any: a.csv.gz is a CSV file."""
    return SUFFIXES.get(Path(path.name.lower().removesuffix(".gz")).suffix)


# ------------------------------------------------------------------------------------------------------ bytes and characters


def _digest(stream, path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in timed(iter(lambda: stream.read(CHUNK), b""), str(path)):
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _bytes(file: File):
    try:
        with gzip.open(file.name) if file.gzipped else open(file.name, "rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file.name} is cut or damaged, so none of it is read ({error}): make the gzip file again") from error
    except OSError as error:
        raise UserError(f"{file.name} can't be read: {error.strerror}") from error


@contextmanager
def _text(file: File, newline: str = "\n", errors: str = "strict"):
    """The characters of a file after its byte order mark. By default only \\n ends a line, as JSON allows U+2028 in a string."""
    with _bytes(file) as stream, io.TextIOWrapper(stream, file.encoding, errors, newline) as text:
        if text.read(1) != "\ufeff":
            text.seek(0)
        yield text


def _nuls_alternate(start: bytes) -> bool:
    """Whether these bytes have NULs where UTF-16 has them: in every second place, for what is ASCII in a text."""
    few, many = sorted((start[::2].count(0), start[1::2].count(0)))
    return many > max(2, len(start) / 16) and few < many / 8


def _find_encoding(file: File, hint: str | None) -> None:
    """Set `file.encoding`. Raises `UserError` with the row and the byte if the file is not text, or in no encoding that is certain."""
    failure = _decode(file, file.encoding)
    if failure is None:
        return
    seen, samples = Counter(), []

    def see(text):
        seen.update(text)
        if not samples:
            samples.extend(_chinese_in(text))

    if file.encoding == "utf-8" and failure[2] and _decode(file, "gb18030", see) is None and _is_chinese(seen):
        _take_for_gb18030(file, samples)
        return
    line, offset, byte = failure
    with _text(file, "", errors="replace") as stream:
        first = stream.readline()
        row = f"row {line}"
        if hint == "csv" or (hint is None and _format(first, None, None, ()) == "csv"):
            row = f"row {_csv_row(stream, line)} (line {line})"
    if byte == 0:
        raise UserError(f"{file.name}, {row}: a NUL byte, which no text holds (byte 0x00 at offset {offset}): take it out, or save the "
                        "file as UTF-8")
    known = "UTF-16 as its byte order mark says" if file.encoding != "utf-8" else "UTF-8 text, nor clearly Chinese in GB18030"
    raise UserError(f"{file.name}, {row}: not {known} (byte {byte:#04x} at offset {offset}); save the file as UTF-8")


def _glance_at_encoding(file: File) -> None:
    """Set `file.encoding` where a look at the first megabyte that is not ASCII shows GB18030."""
    if file.encoding != "utf-8":
        return
    with _bytes(file) as stream:
        chunks = iter(lambda: stream.read(CHUNK), b"")
        chunk = next((chunk for chunk in itertools.islice(chunks, LOOKED_AT // CHUNK) if not chunk.isascii()), b"")
        chunk += stream.read(CHUNK) if chunk else b""
    for encoding in ("utf-8", "gb18030"):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(chunk)
        except UnicodeDecodeError:
            continue
        if encoding == "gb18030" and _is_chinese(Counter(text)):
            _take_for_gb18030(file, _chinese_in(text))
        return


def _chinese_in(text: str) -> list[str]:
    """The first characters of a text that are Chinese, if any."""
    return re.findall(r"[\u4e00-\u9fff]+", text)[:1]


def _take_for_gb18030(file: File, samples: list[str]) -> None:
    file.encoding = "gb18030"
    file.notes.append(f"{file.name} is not UTF-8 and is read as GB18030: if {short(samples[0][:10])} is garbled, save it as UTF-8")


def _decode(file: File, encoding: str, see=lambda text: None) -> tuple[int, int, int] | None:
    """Decode a file to its end, handing each piece to `see`. Returns (line, offset, byte) of the first byte that can't be, or is 0."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, line, chunk = 0, 1, b"-"
    with _bytes(file) as stream:
        while chunk:
            pending, _ = decoder.getstate()
            with deadline(file.name):
                chunk = stream.read(CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(encoding, "ignore")
                return line + before.count("\n"), offset - len(pending) + error.start, error.object[error.start]
            if "\0" in text:
                before = text[: text.index("\0")]
                return line + before.count("\n"), offset - len(pending) + len(before.encode(encoding)), 0
            see(text)
            line += text.count("\n")
            offset += len(chunk)
    return None


def _is_chinese(seen: Counter) -> bool:
    """Whether characters decoded as GB18030 are what Chinese text is made of, rather than another encoding's bytes taken for it.

    Other encodings' bytes fall all over GB18030's 27,000 characters. Chinese keeps to the 6,763 of GB 2312 and to its punctuation,
    mostly to the 3,755 of its first level, and again and again to a few dozen.
    """
    foreign = {character: n for character, n in seen.items() if character > "\x7f"}
    levels = Counter()
    for character, n in foreign.items():
        code = character.encode("gb2312", "ignore")
        # GB 2312 has punctuation in rows A1 and A3 (full-width forms), its first level in B0 to D7, its second in D8 to F7.
        level = 0 if not code else "mark" if code[0] in (0xA1, 0xA3) else 1 if 0xB0 <= code[0] <= 0xD7 else 2 if code[0] >= 0xD8 else 0
        levels[level] += n
    han = levels[1] + levels[2]
    frequent = sum(n for character, n in foreign.items() if character in FREQUENT)
    return han > 0 and levels[0] <= 0.05 * sum(foreign.values()) and levels[1] >= 0.85 * han and frequent >= 0.15 * han


# ---------------------------------------------------------------------------------------------------------------- formats


def _format(first: str, second: str | None, hint: str | None, names: Iterable[str]) -> str:
    """The format of a text, from its first two lines that are not blank."""
    if first.lstrip()[:1] in ("{", "["):
        value, wrong = shapes.parse_rows(first)
        if wrong is None and second is not None:
            return "jsonl"
        if wrong is None:
            return "json" if _list_in(value) is not None else "jsonl"
        opens = first.strip() in ("[", "[{") or (first.strip() == "{" and (second or "").lstrip().startswith('"'))
        if opens or hint not in ("jsonl", "csv", "text"):
            return "json"
    if hint in ("jsonl", "json", "csv"):
        return hint
    looks = any(known and _looks_like_names(_split(first, d)) and fields > 1
                for d in ",;\t" for known, fields in [_names_in(first, d, names)])
    return "csv" if looks else "text"


def _list_in(value) -> list | None:
    """The rows that a JSON document holds: its array, or the only list in its object. None if it is itself a row."""
    if isinstance(value, list):
        return value
    lists = [entry for entry in value.values() if isinstance(entry, list)] if isinstance(value, dict) else []
    return lists[0] if len(lists) == 1 and not shapes.NAMES & value.keys() else None


def _jsonl(file: File) -> Iterator[Record]:
    with _text(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                row, wrong = shapes.parse(line.strip("\n"))
                yield _object(number, row, wrong)


def _json(file: File) -> Iterator[Record]:
    with _text(file) as stream:
        text = stream.read()
    value, wrong = shapes.parse_rows(text)
    if wrong:
        raise UserError(f"{file.name}: {wrong}; none of it is read: a JSON file holds one array of rows, a .jsonl file one object a line")
    rows = _list_in(value)
    for number, row in enumerate([value] if rows is None else rows, start=1):
        yield _object(number, row, shapes.odd(row))


def _object(number: int, row, wrong: str | None = None) -> Record:
    if wrong is None and not isinstance(row, dict):
        row, wrong = {}, f"expected a JSON object, not {short(row)}"
    return Record(number, row, wrong)


def _lines(file: File) -> Iterator[Record]:
    with _text(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield Record(number, {"text": line.removesuffix("\n").removesuffix("\r")})


def _csv(file: File) -> Iterator[Record]:
    with _text(file, newline="") as stream:
        number = 0
        for line, fields in _fields(stream, file):
            if number and len(fields) != len(file.columns):
                wrong = (f"{len(fields)} fields, but the header names {len(file.columns)}: {short(file.delimiter.join(fields))} "
                         f'(a field that holds {_called(file.delimiter)} or a line break needs "quotes")')
                yield Record(number, {}, wrong, line)
            elif number:
                yield Record(number, dict(zip(file.columns, fields, strict=True)), None, line)
            number += 1


def _fields(stream, file: File) -> Iterator[tuple[int, list[str]]]:
    """The line where each record of a CSV file begins, and its fields; the header is the first record, blank lines are none."""
    reader = csv.reader(stream, delimiter=file.delimiter, strict=True)
    for number in itertools.count():
        fields = []
        while not fields or (len(fields) == 1 and not fields[0].strip() and len(file.columns or []) != 1):
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{file.name}, row {number} (line {line}): the quotes of a field do not close as they should ({error}), so "
                                'where the rows end is uncertain: write a quote inside "quotes" as ""') from error
        yield line, fields


def _csv_row(stream, line: int) -> int:
    """The number of the record that holds `line`, of a stream whose header has been read."""
    reader = csv.reader(stream)
    return sum(1 for _ in itertools.takewhile(lambda _: reader.line_num + 1 < line, filter(None, reader))) + 1


def _header(file: File, names: Iterable[str]) -> list[str]:
    with _text(file, newline="", errors="replace") as stream:
        _, header = next(_fields(stream, file), (1, []))
    header = [name.strip() for name in header]
    if header and not {*shapes.NAMES, *names} & {*header} and not _looks_like_names(header):
        raise UserError(f"{file.name}, line 1: the first line must name the columns, but it looks like data: "
                        f"{short(file.delimiter.join(header))}; put a line such as prompt{file.delimiter}response before it")
    return _unique(header, file.name)


def _unique(header: list[str], name: str) -> list[str]:
    twice = next((column for column, n in Counter(header).items() if n > 1), None)
    if twice is not None:
        raise UserError(f"{name}: two columns are called {short(twice)}; give each its own name")
    return header


def _looks_like_names(fields: list[str]) -> bool:
    """Whether these could name columns: short words, no sentences, no numbers; pandas leaves the name of its index empty."""
    return all(re.fullmatch(r"[^\W\d][\w .:/()-]{0,39}", name) and not name.endswith(".") for name in fields[not fields[0]:])


def _names_in(line: str, delimiter: str, names: Iterable[str]) -> tuple[int, int]:
    """How many fields of a header are names that we know, and how many there are in all."""
    fields = _split(line, delimiter)
    return sum(name in shapes.NAMES or name in names for name in fields), len(fields)


def _split(line: str, delimiter: str) -> list[str]:
    records = csv.reader(io.StringIO(line, newline=""), delimiter=delimiter)  # which knows \r alone as the end of a line, too
    return [name.strip() for name in next(filter(None, records), [""])]


def _called(delimiter: str) -> str:
    return {"\t": "a tab", ",": "a comma", ";": "a semicolon"}[delimiter]


@contextmanager
def _parquet(file: File):
    try:
        if file.gzipped:
            with _bytes(file) as stream:
                yield pq.ParquetFile(pa.BufferReader(stream.read()))
        else:
            with pq.ParquetFile(file.name) as table:
                yield table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file.name} is no Parquet file, or cut or damaged ({' '.join(str(error).split())[:150]}): "
                        "make it again") from error


def _table(file: File) -> Iterator[Record]:
    with _parquet(file) as table:
        number = 0
        for batch in table.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield Record(number, row := without_nulls(row), shapes.odd(row))


def _hub(file: File) -> Iterator[Record]:
    for number, row in enumerate(file.hub(), start=1):
        yield Record(number, row := without_nulls(row), shapes.odd(row))


def without_nulls(value):
    """`value` without the keys whose value is null: a table has every column and every key in every row, used or not."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value
