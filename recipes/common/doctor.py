"""What is wrong with a data set before hours of training go into it: findings, a summary for machines, a text for the terminal.

Pure: rows, lengths and labels are handed in; nothing is read, tokenized or printed here. Findings and summary hold counts, labels and
row numbers, never the text of a row, so that personal data doesn't get into a log. `rendered`, which shows a row, is the exception.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from recipes.common import disk
from recipes.common.chat import IGNORE
from recipes.common.duplicates import Texts, digest, leaks, near_duplicates, row_text
from recipes.common.metrics import detect_language, stray_tags
from recipes.common.pii import KINDS, ORDER_PATTERNS, find
from recipes.common.wording import counted

SEVERITIES = ("error", "warning", "info")
RARE = 5    # a label in fewer rows of train is learned from next to nothing
BARS = 10   # of a histogram, at most
WIDTH = 40  # characters of the longest bar, on a screen that has room for it
MINORITY = 0.25  # share of the smaller of two languages from which a row is mixed
SHOWN = 10  # items of a list in the terminal; the summary has all
LOOKED_AT = 100  # rows of a split that `brief` searches for personal data; libphonenumber takes a tenth of a tokenizer's time
LOPSIDED = 0.9   # share of the rows with one label from which `brief` warns

# How to mend what a code stands for.
REMEDIES = {
    "unreadable": "mend the file, or leave it out",
    "bad-row": "mend these rows, or leave them out with --on_bad_row skip",
    "refused-row": "mend these rows, leave them out with --on_bad_row skip, or take another --model",
    "stops": "mend that first, as the other checks wait for it",
    "shortened": "raise --max_length, unless that text can be spared",
    "left-out": "raise --max_length, split long answers, or take these rows out",
    "nothing-trained": "raise --max_length, or take these rows out",
    "no-end": "the model would not learn to stop: take another --model, or report its chat template",
    "double-bos": "take the token out of the text; the chat template writes it already",
    "special-token": "take it out of the text: the model would read it as a sign of its own",
    "unknown-token": "take another --model, whose tokenizer knows these characters",
    "rare-label": "add rows or merge such labels (for classify, --class_weights balanced helps)",
    "one-label": "add rows with other labels, or name another column with --label",
    "stray-tag": "give the first word of each span a B- tag, and all of its words the same type",
    "unseen-label": "add train rows with these labels, or take the rows out",
    "conflict": "decide for one of them",
    "language": 'correct the column "language": scores are kept by it',
    "duplicate": "keep one of each, unless their number is meant to count",
    "near-duplicate": "keep one of each, unless the variety is meant",
    "leak-exact": "take these rows out of one of the two splits",
    "leak-near": "look at them, and take what is the same out of one of the two splits",
    "leak-id": "take these rows out of one of the two splits, or correct the ids",
    "not-drawn": "",  # the sentence says it
    "not-compared": "",
    **dict.fromkeys([f"personal-{kind.lower().replace('_', '-')}" for kind in KINDS],
                    "--mask_pii OUT writes a copy with placeholders in their place"),
}

# Letters: Han characters, Latin ones, all others.
_SCRIPTS = [re.compile(pattern) for pattern in (
    r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+", r"[A-Za-z\u00c0-\u024f\uff21-\uff3a\uff41-\uff5a]+",
    r"[^\W\d_A-Za-z\u00c0-\u024f\uff21-\uff3a\uff41-\uff5a\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")  # but for line end and tab
_LABELS = ("label", "tags", "intent", "sentiment", "action")  # columns of a row, or keys of its turns
_LEAKS = {"exact": "exact", "near": "near", "id": "of the same id"}
PERSONAL = {"EMAIL": "e-mail addresses", "ID_CARD": "identity card numbers", "IBAN": "bank account numbers",
            "BANK_CARD": "bank card numbers", "ORDER": "order numbers", "PHONE": "telephone numbers"}


@dataclass(frozen=True)
class Split:
    """The rows of a file (data/README.md) and what a tokenizer makes of them; entry i of each list is about the same row.

    Where a row of the file holds several of the task's (a dialogue with its labelled turns), `items` are the task's, `item_numbers` the
    row of the file that each is from, and lengths and supervised counts are about these.
    """

    rows: Sequence[dict]
    numbers: Sequence[int | str]      # row numbers in the file; "FILE:NUMBER" where a split has several files
    lengths: Sequence[int]            # tokens of the whole row, before anything is shortened
    supervised: Sequence[int | None]  # tokens trained on after shortening; 0 for a row that is left out, None for one that should be
    items: Sequence[dict] | None = None
    item_numbers: Sequence[int | str] | None = None
    unit: str = "rows"       # what an item is called
    trained: str = "tokens"  # what is counted as supervised
    learned: Sequence[str] = ("label", "tags")  # columns that a model is to predict; others are shown and no more
    kept: Sequence[bool] | None = None  # whether the row has a part in the training, shortened or not; None: where it has such tokens
    joined: str = ""  # what becomes of rows that are not shortened but joined or cut into pieces, as a sentence
    total: int | None = None  # of what is trained on, where that can't be told row by row

    def labelled(self) -> Iterator[tuple[int | str, dict]]:
        """Number and item of each that has a part in the training or its scores, one at a time."""
        items, numbers = (self.rows, self.numbers) if self.items is None else (self.items, self.item_numbers)
        return ((n, item) for n, item, supervised in zip(numbers, items, self.supervised, strict=True) if supervised is not None)


@dataclass(frozen=True)
class Finding:
    """One thing to know or to mend about a split."""

    severity: str    # "error": the training would stop; "warning": look at it, or scores will be wrong; "info"
    code: str        # names the check for machines: "leak-exact", "too-long", ...
    sentence: str
    rows: list[int | str]  # row numbers in the file of `split`; empty when it is about all of them
    count: int       # of what the sentence is about: rows, labels, texts
    split: str


def examine(splits: dict[str, Split], max_length: int, threshold: float = 0.8,
            orders: Sequence[str] = ORDER_PATTERNS, found: Sequence[Finding] = ()) -> tuple[dict, list[Finding]]:
    """Run all checks over `splits`: train, dev and test, or some of them, each with at least one row.

    `max_length` in tokens; `threshold` as in `duplicates.near_duplicates`, `orders` as in `pii.find`; `found` are findings of elsewhere,
    to be told with these. Returns a summary that `json.dumps` takes, and the findings, errors first. Raises ValueError when a split is
    empty or its lists differ in length.
    """
    summary, findings = {"max_length": max_length, "threshold": threshold, "splits": {}}, list(found)
    for name, split in splits.items():
        items = (split.rows, split.numbers) if split.items is None else (split.items, split.item_numbers)
        sizes = [len(part) for part in (*items, split.lengths, split.supervised)]
        if len(set(sizes)) != 1 or not sizes[0] or len(split.rows) != len(split.numbers):
            raise ValueError(f"{name}: {sizes} rows, row numbers, lengths and supervised counts; give one of each for at least one row")
        checks = {
            "tokens": partial(_check_lengths, name, split, max_length),
            "labels": partial(_check_labels, name, split),
            "stray_tags": partial(_check_tags, name, split),
            "conflicts": partial(_check_conflicts, name, split),
            "languages": partial(_check_languages, name, split),
            "duplicates": partial(_check_duplicates, name, split, threshold),
            "personal_data": partial(_check_personal_data, name, split, orders),
        }
        figures = {}
        for key, check in checks.items():
            figures[key], found = check()
            findings += found
            disk.forget()
        summary["splits"][name] = {"rows": len(split.rows), "items": sizes[0], "unit": split.unit, "trained": split.trained, **figures}
    summary["leaks"], found = _check_leaks(splits, threshold)
    findings += found + _check_unseen_labels(splits, {name: split["labels"] for name, split in summary["splits"].items()})
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))  # stable
    summary["findings"] = as_json(findings)
    return summary, findings


def as_json(findings: Sequence[Finding]) -> list[dict]:
    """Findings as `json.dumps` takes them, each with how to mend it."""
    return [asdict(finding) | {"remedy": REMEDIES[finding.code]} for finding in findings]


def brief(train: Sequence[dict], dev: Sequence[dict], labels: dict[str, int] | None = None,
          repeated: bool = False) -> tuple[dict, list[str]]:
    """What is worth a line before every training: counts for run.json, and sentences on what is not as it should be.

    `labels`: how often each that is predicted for a row occurs in train. `repeated`: train repeats rows on purpose. Linear, and a few
    hundredths of what tokenizing takes: it compares digests, and searches `LOOKED_AT` rows of a split for personal data.
    """
    known, copies, sentences = set(), 0, []
    for row in train:
        own = digest(row_text(row))
        copies += own in known
        known.add(own)
    leaked = sum(digest(row_text(row)) in known for row in dev)
    counts = {"duplicates": None if repeated else copies, "leaks": leaked, "personal_data": {}}
    if copies and not repeated:
        sentences.append(f"{copies} of {len(train)} train rows repeat an earlier one word for word")
    if leaked:
        sentences.append(f"{leaked} of {len(dev)} dev rows stand in train word for word, so dev scores are too good")
    for name, rows in (("train", train), ("dev", dev)):
        looked_at = range(0, len(rows), -(-len(rows) // LOOKED_AT) or 1)
        kinds = Counter(kind for i in looked_at for kind in {found.kind for text in texts(rows[i]) for found in find(text)})
        counts["personal_data"][name] = {"looked_at": len(looked_at), "rows": {kind: kinds[kind] for kind in KINDS if kinds[kind]}}
        if kinds:
            sentences.append(f"personal data ({len(looked_at)} {name} rows looked at): "
                             + ", ".join(f"{PERSONAL[kind]} in {kinds[kind]}" for kind in KINDS if kinds[kind]))
    if labels:
        label, most = max(labels.items(), key=lambda item: item[1])
        share, rare = most / max(1, sum(labels.values())), [label for label, n in labels.items() if n < RARE]
        counts["labels"] = {"most_frequent": label, "share": share, "rare": len(rare)}
        if share >= LOPSIDED:
            sentences.append(f"{share:.0%} of the train labels are {label}, so always saying that would score as much")
        if rare:
            sentences.append(f"{len(rare)} of {len(labels)} labels occur fewer than {RARE} times in train: {_listed(rare)}")
    return counts, sentences


def length_summary(lengths: Sequence[int], max_length: int) -> dict:
    """Of lengths in tokens: total, shortest, median, mean, longest; how many are `over` max_length; the smallest max_length that
    `keeps` 95, 99 and 100 % of them whole; a histogram. Raises ValueError when there is none."""
    if not lengths:
        raise ValueError("no lengths to summarise")
    ordered = sorted(lengths)
    n = len(ordered)
    return {
        "total": sum(ordered),
        "shortest": ordered[0],
        "median": (ordered[(n - 1) // 2] + ordered[n // 2]) / 2,
        "mean": sum(ordered) / n,
        "longest": ordered[-1],
        "over": sum(length > max_length for length in ordered),
        "keeps": {str(percent): ordered[-(-percent * n // 100) - 1] for percent in (95, 99, 100)},  # rounded up in integers
        "histogram": histogram(ordered),
    }


def histogram(lengths: Sequence[int]) -> list[dict]:
    """Equal bins from 0 to the longest length, at most `BARS`: how many `rows` have `from` to `to` tokens, both included.

    Bins are 1, 2 or 5 times a power of ten wide, so that their borders are easy to read.
    """
    longest = max(lengths)
    width = next(step * 10**power for power in range(20) for step in (1, 2, 5) if longest < BARS * step * 10**power)
    counts = Counter(length // width for length in lengths)
    return [{"from": i * width, "to": (i + 1) * width - 1, "rows": counts[i]} for i in range(longest // width + 1)]


def labels_of(row: dict) -> dict[str, list[str]]:
    """The labels of a row by column: `label` and `tags`, and the `intent`, `sentiment` and `action` of its turns, as strings."""
    found = {}
    for part in (row, *row.get("messages", [])):
        for column in _LABELS:
            if part.get(column) is not None:
                values = part[column] if isinstance(part[column], list) else [part[column]]
                found.setdefault(column, []).extend(value if isinstance(value, str) else json.dumps(value) for value in values)
    return found


def language_mix(text: str) -> str:
    """"en" (Latin letters), "zh", "mixed" if both have a good part of it, or "other": mostly other letters, or none.

    As in metrics.detect_language, a Han character counts as four letters.
    """
    han, latin, others = (sum(map(len, pattern.findall(text))) for pattern in _SCRIPTS)
    if others > 0.2 * (han + latin + others) or not han + latin:
        return "other"  # kana among Han characters as well
    share = 4 * han / (4 * han + latin)
    return "zh" if share > 1 - MINORITY else "mixed" if share >= MINORITY else "en"


def balance(rows: Iterable[dict]) -> dict[str, dict]:
    """For each column of labels: `counts` of each label, most frequent first; `entropy` in bits, and `most`, what it would be if all
    were equally frequent; the `rare` labels, those in fewer than `RARE` rows, with their number of rows."""
    counts, in_rows = {}, {}
    for row in rows:
        for column, values in labels_of(row).items():
            counts.setdefault(column, Counter()).update(values)
            in_rows.setdefault(column, Counter()).update(set(values))
    return {
        column: {
            "counts": dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))),
            "entropy": sum(-c / counter.total() * math.log2(c / counter.total()) for c in counter.values()) + 0.0,  # not -0.0
            "most": math.log2(len(counter)) if counter else 0.0,
            "rare": {label: n for label, n in sorted(in_rows[column].items(), key=lambda item: (item[1], item[0])) if n < RARE},
        }
        for column, counter in counts.items()
    }


def report(summary: dict, findings: Sequence[Finding], colour: bool = False, columns: int = 80) -> str:
    """The text for a terminal of so many `columns`, of what `examine` returned. `colour`: severities in ANSI colours."""
    lines = []
    for name, split in summary["splits"].items():
        tokens, duplicates = split["tokens"], split["duplicates"]
        several = "" if split["items"] == split["rows"] else f" in {counted(split['rows'], 'rows')}"
        lines += [
            f"{name}: {counted(split['items'], split['unit'])}{several}, {counted(tokens['total'], 'tokens')}, "
            f"{counted(tokens['supervised'], split['trained'])} trained on",
            f"  tokens of each: {tokens['shortest']:,} to {tokens['longest']:,}, median {tokens['median']:,g}, mean {tokens['mean']:,.1f}",
            *bars(tokens["histogram"], columns),
            f"  --max_length {summary['max_length']}: "
            + (f"{tokens['joined']}; fits in one: " if tokens["joined"] else
               f"{tokens['shortened']:,} shortened, {tokens['untrained']:,} with nothing trained on; kept whole ")
            + ", ".join(f"{percent} % by {length}" for percent, length in tokens["keeps"].items()),
            "  languages: " + ", ".join(f"{language} {n:,}" for language, n in split["languages"].items()),
        ]
        for column, labels in split["labels"].items():
            shown = _listed([f"{label} {n:,}" for label, n in labels["counts"].items()], 6)
            lines.append(f"  {visible(column)}: {counted(len(labels['counts']), 'labels')}, entropy {labels['entropy']:.2f} of "
                         f"{labels['most']:.2f} bits: {visible(shown)}")
        personal = ", ".join(f"{PERSONAL[kind]} {found['places']:,} (rows: {len(found['rows']):,})"
                             for kind, found in split["personal_data"].items())
        lines += [
            f"  duplicates: {duplicates['exact']:,} exact, {duplicates['near']:,} near",
            f"  personal data: {personal or 'none found'}",
            "",
        ]
    kinds = Counter(leak["kind"] for leak in summary["leaks"]["found"]) if "leaks" in summary else {}
    if len(summary["splits"]) > 1:
        lines += ["leaks between splits: " + (", ".join(f"{n:,} {_LEAKS[kind]}" for kind, n in kinds.items()) or "none found"), ""]
    return "\n".join([*lines, *verdict(findings, colour)])


def verdict(findings: Sequence[Finding], colour: bool = False) -> list[str]:
    """Lines for a terminal: each finding with how to mend it, and how many there are."""
    lines = []
    for finding in findings:
        paint = {"error": "31", "warning": "33", "info": "36"}[finding.severity]
        mark = f"\033[{paint}m{finding.severity}\033[0m" if colour else finding.severity
        rows = f" (row{'s' * (len(finding.rows) > 1)} {_listed(finding.rows)})" if finding.rows else ""
        remedy = REMEDIES[finding.code]
        lines.append(f"{mark}: {visible(finding.sentence)}{rows}{remedy and f'; {remedy}'} [{finding.code}]")
    totals = Counter(finding.severity for finding in findings)
    return [*lines, f"errors: {totals['error']}, warnings: {totals['warning']}, infos: {totals['info']}"]


def bars(bins: Sequence[dict], columns: int = 80) -> list[str]:
    """Lines of a histogram, from the first bin with a row: from, to, rows and a bar. A bin that isn't empty shows at least a sliver.

    No line has more than `columns` characters, if there is room for the figures and a short bar.
    """
    bins = bins[next(i for i, bin in enumerate(bins) if bin["rows"]):]
    most = max(bin["rows"] for bin in bins)
    edge, figure = len(f"{bins[-1]['to']:,}"), len(f"{most:,}")
    room = min(WIDTH, max(4, columns - (2 + edge + 3 + edge + 2 + figure + 1)))
    return [f"  {bin['from']:>{edge},} - {bin['to']:>{edge},}  {bin['rows']:>{figure},} {_bar(bin['rows'], most, room)}".rstrip()
            for bin in bins]


def visible(text: str) -> str:
    """`text` for a terminal: characters that could move its cursor, change its colours or turn the text around become escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def rendered(tokenizer, input_ids: Sequence[int], labels: Sequence[int], colour: bool = True, change: Callable = lambda text: text) -> str:
    """The text of `input_ids`, special tokens included, with what is trained on in green (ANSI), or in ⟦brackets⟧ without colour.

    `labels` (not shifted) have `chat.IGNORE` where nothing is trained on. A character whose bytes fall on both sides of a border
    counts to the later side. `change` is applied to the text before it is marked. Raises ValueError when the two differ in length.
    """
    if len(input_ids) != len(labels):
        raise ValueError(f"{len(input_ids)} input_ids but {len(labels)} labels")
    text, shown = "", ""
    for i, label in enumerate(labels):
        last = i + 1 == len(labels)
        if last or (label == IGNORE) != (labels[i + 1] == IGNORE):
            # Always decoded from the beginning: a token in the middle of a text may decode otherwise than at its start.
            so_far = tokenizer.decode(input_ids[:i + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if not last:
                so_far = so_far.rstrip("\ufffd")
            piece, text = so_far[len(text):], so_far
            shown += change(piece) if label == IGNORE else marked(change(piece), colour)
    return shown


def marked(text: str, colour: bool = True) -> str:
    """`text` as something that is trained on: see `rendered`."""
    return f"\033[32m{text}\033[0m" if colour else f"⟦{text}⟧"


def flaws(input_ids: Sequence[int], labels: Sequence[int], end: int, bos: int | None) -> set[str]:
    """Codes of what is wrong with an encoded dialogue: "no-end" if something that is trained on does not stop with the token `end`,
    "double-bos" if it begins with the token `bos` twice."""
    found, labels = set(), np.asarray(labels)
    trained = labels != IGNORE
    if (labels[trained & ~np.append(trained[1:], False)] != end).any():  # the last of each run
        found.add("no-end")
    if bos is not None and list(input_ids[:2]) == [bos, bos]:
        found.add("double-bos")
    return found


def texts(row: dict) -> list[str]:
    """All that a model reads of a row. System turns count here, as they do not in `row_text`."""
    return [turn["content"] for turn in row["messages"]] if "messages" in row else [row_text(row)]


def _check_lengths(name: str, split: Split, max_length: int) -> tuple[dict, list[Finding]]:
    numbers = split.numbers if split.items is None else split.item_numbers
    kept = split.kept or [supervised != 0 or length <= max_length
                          for length, supervised in zip(split.lengths, split.supervised, strict=True)]
    each = list(zip(numbers, split.lengths, split.supervised, kept, strict=True))
    rows = {
        "shortened": [number for number, length, _, stays in each if length > max_length and stays and not split.joined],
        "left-out": [number for number, length, _, stays in each if length > max_length and not stays],
        "nothing-trained": [number for number, length, supervised, stays in each if supervised == 0 and (stays or length <= max_length)],
    }
    figures = {**length_summary(split.lengths, max_length), "joined": split.joined,
               "supervised": sum(filter(None, split.supervised)) if split.total is None else split.total,
               "shortened": len(rows["shortened"]), "left_out": len(each) - sum(kept),
               "untrained": len(rows["left-out"]) + len(rows["nothing-trained"])}
    keeps, n = figures["keeps"], f"{len(each)} {split.unit} in {name}"
    whole = f"{keeps['95']} keeps 95 % whole, {keeps['99']} keeps 99 %, {keeps['100']} all"
    sentences = {
        "shortened": f"exceed --max_length {max_length} and are shortened; {whole}",
        "left-out": f"exceed --max_length {max_length} so far that nothing of them is trained on; {whole}",
        "nothing-trained": "have nothing to train on",
    }
    return figures, [Finding("warning", code, f"{len(found)} of {n} {sentences[code]}", list(dict.fromkeys(found)), len(found), name)
                     for code, found in rows.items() if found]


def _check_labels(name: str, split: Split) -> tuple[dict, list[Finding]]:
    figures, findings = balance(item for _, item in split.labelled()), []
    for column, labels in figures.items() if name == "train" else ():
        if column not in split.learned:
            continue
        counts, rare = labels["counts"], labels["rare"]
        if rare:
            findings.append(Finding("warning", "rare-label", (
                f"{len(rare)} of {len(counts)} values of {column} occur in fewer than {RARE} rows of {name}: {_listed(list(rare))}"),
                _rows_with(split, column, rare), len(rare), name))
        if len(counts) == 1:
            findings.append(Finding("warning", "one-label", (
                f"1 value of {column} is all that {name} has ({_listed(list(counts))}), so there is nothing to tell apart"), [], 1, name))
    return figures, findings


def _check_unseen_labels(splits: dict[str, Split], balances: dict[str, dict]) -> list[Finding]:
    known, findings = balances.get("train", {}), []
    for name, split in splits.items():
        for column, labels in balances[name].items():
            unseen = sorted(labels["counts"].keys() - known[column]["counts"].keys()) if column in known and column in split.learned else []
            if unseen:
                findings.append(Finding("warning", "unseen-label", (
                    f"{len(unseen)} of {len(labels['counts'])} values of {column} in {name} never occur in train: {_listed(unseen)}"),
                    _rows_with(split, column, unseen), len(unseen), name))
    return findings


def _rows_with(split: Split, column: str, labels: Iterable[str]) -> list[int]:
    wanted = set(labels)
    return list(dict.fromkeys(number for number, item in split.labelled() if wanted & set(labels_of(item).get(column, []))))


def _check_tags(name: str, split: Split) -> tuple[int, list[Finding]]:
    """Tags that only seem to go on with a span: most come from a wrong type or a lost B-."""
    if "tags" not in split.learned:
        return 0, []
    rows = {number: [(row["tags"][i - 1] if i else "the start", row["tags"][i]) for i in stray_tags(row["tags"])]
            for number, row in zip(split.numbers, split.rows, strict=True) if "tags" in row}
    pairs = [pair for found in rows.values() for pair in found]
    if not pairs:
        return 0, []
    return len(pairs), [Finding("warning", "stray-tag", (
        f"{counted(len(pairs), 'tag I-... continues|tags I-... continue')} no span of the type in {name}, so each begins one of its own: "
        f"{_listed([f'{tag} after {before}' for before, tag in dict.fromkeys(pairs)], 5)}"),
        [number for number, found in rows.items() if found], len(pairs), name)]


def _check_conflicts(name: str, split: Split) -> tuple[int, list[Finding]]:
    """Texts with several labels. Turns of a dialogue are left out: what a "yes" means depends on what came before."""
    if not split.learned:
        return 0, []
    labels, numbers = {}, {}
    for number, row in zip(split.numbers, split.rows, strict=True):
        if given := [row[column] for column in split.learned if column in row]:
            own = digest(row_text(row))
            labels.setdefault(own, set()).add(json.dumps(given))
            numbers.setdefault(own, []).append(number)
    found = [own for own, different in labels.items() if len(different) > 1]
    if not found:
        return 0, []
    rows = [number for own in found for number in numbers[own]]
    return len(found), [Finding("warning", "conflict", (
        f"{len(found)} of {len(labels)} different texts in {name} stand there with more than one label"), rows, len(found), name)]


def _check_languages(name: str, split: Split) -> tuple[dict, list[Finding]]:
    figures, wrong, findings = Counter(), [], []
    for number, row in zip(split.numbers, split.rows, strict=True):
        text = row_text(row)
        figures[language_mix(text)] += 1
        wrong += [number] if row.get("language") in ("en", "zh") and row["language"] != detect_language(text) else []
    figures = dict(sorted(figures.items()))
    if wrong:
        findings.append(Finding("warning", "language", (
            f'{counted(len(wrong), "rows")} in {name} with a "language" that the text is not in'), wrong, len(wrong), name))
    return figures, findings


def _check_duplicates(name: str, split: Split, threshold: float) -> tuple[dict, list[Finding]]:
    found = near_duplicates(Texts(split.rows), threshold)
    copies = {i for group in found.exact for i in group[1:]}
    near = {i for group in found.groups for i in group[1:]} - copies
    figures = {"exact": len(copies), "near": len(near), "comparisons": found.comparisons, "skipped": found.skipped,
               "groups": [[split.numbers[i] for i in group] for group in found.groups]}
    findings = []
    for code, rows, text in (
        ("duplicate", copies, "repeat an earlier row word for word"),
        ("near-duplicate", near, f"nearly repeat an earlier row (similarity {threshold:g} or more, or by way of a third row)"),
    ):
        if rows:
            numbers = [split.numbers[i] for i in sorted(rows)]
            findings.append(Finding("warning", code, f"{len(rows)} of {len(split.rows)} rows in {name} {text}", numbers, len(rows), name))
    return figures, findings + _skipped(found.skipped, name)


def _check_personal_data(name: str, split: Split, orders: Sequence[str]) -> tuple[dict, list[Finding]]:
    places = {kind: Counter() for kind in KINDS}
    for number, row in zip(split.numbers, split.rows, strict=True):
        for text in texts(row):
            for found in find(text, orders):
                places[found.kind][number] += 1
    figures = {kind: {"places": counter.total(), "rows": list(counter)} for kind, counter in places.items() if counter}
    # Order numbers are what a shop talks about; the others should make one think.
    why = ", which a model may learn and repeat" if name == "train" else ""
    findings = [Finding("info" if kind == "ORDER" else "warning", f"personal-{kind.lower().replace('_', '-')}", (
        f"{len(found['rows'])} of {len(split.rows)} rows in {name} hold {PERSONAL[kind]}{why}"),
        found["rows"], len(found["rows"]), name) for kind, found in figures.items()]
    return figures, findings


def _check_leaks(splits: dict[str, Split], threshold: float) -> tuple[dict, list[Finding]]:
    found = leaks(*(splits[name].rows if name in splits else [] for name in ("train", "dev", "test")), threshold)
    pairs, groups, findings = [], {}, []
    for leak in found.found:
        row, of_row = splits[leak.split].numbers[leak.row], splits[leak.of_split].numbers[leak.of_row]
        pairs.append({**asdict(leak), "row": row, "of_row": of_row})
        groups.setdefault((leak.split, leak.of_split, leak.kind), []).append(pairs[-1])
    texts = {
        "exact": ("warning", "stand word for word in", "scores on {} are too good"),
        "near": ("warning", f"stand nearly (similarity {threshold:g} or more) in", "scores on {} may be too good"),
        "id": ("warning", "share their id with a row of", "a dialogue may stand in both"),
    }
    for (name, earlier, kind), group in groups.items():
        severity, how, so = texts[kind]
        findings.append(Finding(severity, f"leak-{kind}", (
            f"{len(group)} of {len(splits[name].rows)} rows in {name} {how} {earlier}, so {so.format(name)}; for example, row "
            f"{group[0]['row']} of {name} and row {group[0]['of_row']} of {earlier}"), [pair["row"] for pair in group], len(group), name))
    name = next(reversed(splits), "")
    return {"found": pairs, "comparisons": found.comparisons, "skipped": found.skipped}, findings + _skipped(found.skipped, name)


def _skipped(count: int, name: str) -> list[Finding]:
    if not count:
        return []
    return [Finding("info", "not-compared", (
        f"{count} times a row of {name} has so many look-alikes that it was compared with the nearest in the file only; duplicates may be "
        "missing"), [], count, name)]


def _listed(items: Sequence, shown: int = SHOWN) -> str:
    more = f" and {len(items) - shown:,} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + more


def _bar(value: int, most: int, room: int) -> str:
    eighths = max(round(8 * room * value / most), bool(value))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
