"""What is wrong with a data set before hours of training go into it: findings, a summary for machines, a text for the terminal.

Pure: rows, lengths and labels are handed in; nothing is read, tokenized or printed here. Findings and summary hold counts, labels and
row numbers, never the text of a row, so that personal data doesn't get into a log. `rendered`, which shows a row, is the exception.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from recipes.common.chat import IGNORE
from recipes.common.duplicates import leaks, near_duplicates, row_text
from recipes.common.metrics import detect_language
from recipes.common.pii import KINDS, ORDER_PATTERNS, find

SEVERITIES = ("error", "warning", "info")
RARE = 5    # a label in fewer rows of train is learned from next to nothing
BARS = 10   # of a histogram, at most
WIDTH = 40  # characters of the longest bar
SHOWN = 10  # items of a list in the terminal; the summary has all

_LABELS = ("label", "tags", "intent", "sentiment", "action")  # columns of a row, or keys of its turns
_PERSONAL = {"EMAIL": "e-mail addresses", "ID_CARD": "identity card numbers", "BANK_CARD": "bank card numbers",
             "ORDER": "order numbers", "PHONE": "telephone numbers"}


@dataclass(frozen=True)
class Split:
    """The rows of a file (data/README.md) and what a tokenizer makes of them; entry i of each list is about the same row."""

    rows: Sequence[dict]
    numbers: Sequence[int]     # row numbers in the file
    lengths: Sequence[int]     # tokens of the whole row, before anything is shortened
    supervised: Sequence[int]  # tokens trained on after shortening to max_length; 0 for a row that is left out


@dataclass(frozen=True)
class Finding:
    """One thing to know or to mend about a split."""

    severity: str    # "error": training or scores are wrong with it; "warning": look at it; "info"
    code: str        # names the check for machines: "leak-exact", "too-long", ...
    sentence: str
    rows: list[int]  # row numbers in the file of `split`; empty when it is about all of them
    count: int       # the number that the sentence begins with
    split: str


def examine(splits: dict[str, Split], max_length: int, threshold: float = 0.8,
            orders: Sequence[str] = ORDER_PATTERNS) -> tuple[dict, list[Finding]]:
    """Run all checks over `splits`: train, dev and test, or some of them, each with at least one row.

    `max_length` in tokens; `threshold` as in `duplicates.near_duplicates`, `orders` as in `pii.find`. Returns a summary that
    `json.dumps` takes, and the findings, errors first. Raises ValueError when a split is empty or its lists differ in length.
    """
    summary, findings = {"max_length": max_length, "threshold": threshold, "splits": {}}, []
    for name, split in splits.items():
        sizes = [len(part) for part in (split.rows, split.numbers, split.lengths, split.supervised)]
        if len(set(sizes)) != 1 or not sizes[0]:
            raise ValueError(f"{name}: {sizes} rows, row numbers, lengths and supervised counts; give one of each for at least one row")
        checks = {
            "tokens": _check_lengths(name, split, max_length),
            "labels": _check_labels(name, split),
            "languages": _check_languages(name, split),
            "duplicates": _check_duplicates(name, split, threshold),
            "personal_data": _check_personal_data(name, split, orders),
        }
        summary["splits"][name] = {"rows": len(split.rows), **{key: figures for key, (figures, _) in checks.items()}}
        findings += [finding for _, found in checks.values() for finding in found]
    summary["leaks"], found = _check_leaks(splits, threshold)
    findings += found + _check_unseen_labels(splits)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))  # stable
    summary["findings"] = [asdict(finding) for finding in findings]
    return summary, findings


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


def balance(rows: Sequence[dict]) -> dict[str, dict]:
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


def report(summary: dict, findings: Sequence[Finding], colour: bool = False) -> str:
    """The text for a terminal, of what `examine` returned. `colour`: severities in ANSI colours."""
    lines = []
    for name, split in summary["splits"].items():
        tokens, duplicates = split["tokens"], split["duplicates"]
        lines += [
            f"{name}: {split['rows']:,} rows, {tokens['total']:,} tokens, {tokens['supervised']:,} of them trained on",
            f"  tokens a row: {tokens['shortest']:,} to {tokens['longest']:,}, median {tokens['median']:,g}, mean {tokens['mean']:,.1f}",
            *bars(tokens["histogram"]),
            f"  longer than {summary['max_length']:,}: {tokens['over']:,}; "
            + ", ".join(f"{length:,} keeps {percent} %" for percent, length in tokens["keeps"].items()),
            "  languages: " + ", ".join(f"{language} {n:,}" for language, n in split["languages"].items()),
        ]
        for column, labels in split["labels"].items():
            lines.append(f"  {column}: {len(labels['counts']):,} labels, entropy {labels['entropy']:.2f} of {labels['most']:.2f} bits: "
                         + _listed([f"{label} {n:,}" for label, n in labels["counts"].items()]))
        personal = ", ".join(f"{_PERSONAL[kind]} {found['places']:,}" for kind, found in split["personal_data"].items())
        lines += [
            f"  duplicates: exact {duplicates['exact']:,}, near {duplicates['near']:,} ({duplicates['comparisons']:,} comparisons)",
            f"  personal data: {personal or 'none found'}",
            "",
        ]
    leaked = summary["leaks"]
    lines += [f"leaks: {len(leaked['found']):,} ({leaked['comparisons']:,} comparisons)", ""]
    for finding in findings:
        paint = {"error": "31", "warning": "33", "info": "36"}[finding.severity]
        mark = f"\033[{paint}m{finding.severity}\033[0m" if colour else finding.severity
        rows = f" (row{'s' * (len(finding.rows) > 1)} {_listed(finding.rows)})" if finding.rows else ""
        lines.append(f"{mark}: {finding.sentence}{rows} [{finding.code}]")
    totals = Counter(finding.severity for finding in findings)
    lines.append(f"errors: {totals['error']}, warnings: {totals['warning']}, infos: {totals['info']}")
    return "\n".join(lines)


def bars(bins: Sequence[dict]) -> list[str]:
    """Lines of a histogram: from, to, rows and a bar. A bin that isn't empty shows at least a sliver."""
    most = max(bin["rows"] for bin in bins)
    edge, figure = len(f"{bins[-1]['to']:,}"), len(f"{most:,}")
    return [f"  {bin['from']:>{edge},} - {bin['to']:>{edge},}  {bin['rows']:>{figure},} {_bar(bin['rows'], most)}".rstrip()
            for bin in bins]


def rendered(tokenizer, input_ids: Sequence[int], labels: Sequence[int], colour: bool = True) -> str:
    """The text of `input_ids`, special tokens included, with what is trained on in green (ANSI), or in ⟦brackets⟧ without colour.

    `labels` (not shifted) have `chat.IGNORE` where nothing is trained on. A character whose bytes fall on both sides of a border
    counts to the later side. Raises ValueError when the two differ in length.
    """
    if len(input_ids) != len(labels):
        raise ValueError(f"{len(input_ids)} input_ids but {len(labels)} labels")
    opening, closing = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    text, shown = "", ""
    for i, label in enumerate(labels):
        last = i + 1 == len(labels)
        if last or (label == IGNORE) != (labels[i + 1] == IGNORE):
            # Always decoded from the beginning: a token in the middle of a text may decode otherwise than at its start.
            so_far = tokenizer.decode(input_ids[:i + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if not last:
                so_far = so_far.rstrip("\ufffd")
            piece, text = so_far[len(text):], so_far
            shown += piece if label == IGNORE else f"{opening}{piece}{closing}"
    return shown


def _check_lengths(name: str, split: Split, max_length: int) -> tuple[dict, list[Finding]]:
    figures = {**length_summary(split.lengths, max_length), "supervised": sum(split.supervised)}
    findings, keeps, n = [], figures["keeps"], len(split.rows)
    if figures["over"]:
        rows = [number for number, length in zip(split.numbers, split.lengths, strict=True) if length > max_length]
        findings.append(Finding("warning", "too-long", (
            f"{len(rows)} of {n} rows in {name} are longer than --max_length {max_length}, so they lose text or are left out; "
            f"{keeps['95']} keeps 95 % whole, {keeps['99']} keeps 99 %, {keeps['100']} all"), rows, len(rows), name))
    empty = [number for number, tokens in zip(split.numbers, split.supervised, strict=True) if tokens == 0]
    if empty:
        findings.append(Finding("error", "nothing-trained", (
            f"{len(empty)} of {n} rows in {name} have no token to train on; raise --max_length, or take them out"),
            empty, len(empty), name))
    return figures, findings


def _check_labels(name: str, split: Split) -> tuple[dict, list[Finding]]:
    figures, findings = balance(split.rows), []
    for column, labels in figures.items() if name == "train" else ():
        counts, rare = labels["counts"], labels["rare"]
        if rare:
            findings.append(Finding("warning", "rare-label", (
                f"{len(rare)} of {len(counts)} values of {column} occur in fewer than {RARE} rows of {name}: {_listed(list(rare))}"),
                _rows_with(split, column, rare), len(rare), name))
        if len(counts) == 1:
            findings.append(Finding("warning", "one-label", (
                f"1 value of {column} is all that {name} has ({_listed(list(counts))}), so there is nothing to tell apart"), [], 1, name))
    return figures, findings


def _check_unseen_labels(splits: dict[str, Split]) -> list[Finding]:
    known, findings = balance(splits["train"].rows) if "train" in splits else {}, []
    for name, split in splits.items():
        for column, labels in balance(split.rows).items():
            unseen = sorted(labels["counts"].keys() - known[column]["counts"].keys()) if column in known else []
            if unseen:
                findings.append(Finding("warning", "unseen-label", (
                    f"{len(unseen)} of {len(labels['counts'])} values of {column} in {name} never occur in train: {_listed(unseen)}"),
                    _rows_with(split, column, unseen), len(unseen), name))
    return findings


def _rows_with(split: Split, column: str, labels: Iterable[str]) -> list[int]:
    wanted = set(labels)
    return [number for number, row in zip(split.numbers, split.rows, strict=True) if wanted & set(labels_of(row).get(column, []))]


def _check_languages(name: str, split: Split) -> tuple[dict, list[Finding]]:
    detected = [detect_language(row_text(row)) for row in split.rows]
    figures = dict(sorted(Counter(detected).items()))
    mix = ", ".join(f"{n} {language}" for language, n in figures.items())
    findings = [Finding("info", "languages", f"{len(split.rows)} rows in {name}, by their script: {mix}", [], len(split.rows), name)]
    wrong = [number for number, row, language in zip(split.numbers, split.rows, detected, strict=True)
             if row.get("language") in ("en", "zh") and row["language"] != language]
    if wrong:
        findings.append(Finding("warning", "language", (
            f'{len(wrong)} rows in {name} have a "language" that their text is not in'), wrong, len(wrong), name))
    return figures, findings


def _check_duplicates(name: str, split: Split, threshold: float) -> tuple[dict, list[Finding]]:
    found = near_duplicates([row_text(row) for row in split.rows], threshold)
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
        # System turns count here: whatever a row says, the model reads.
        for text in [turn["content"] for turn in row["messages"]] if "messages" in row else [row_text(row)]:
            for found in find(text, orders):
                places[found.kind][number] += 1
    figures = {kind: {"places": counter.total(), "rows": list(counter)} for kind, counter in places.items() if counter}
    # Order numbers are what a shop talks about; the others should make one think.
    findings = [Finding("info" if kind == "ORDER" else "warning", f"personal-{kind.lower().replace('_', '-')}", (
        f"{len(found['rows'])} of {len(split.rows)} rows in {name} hold {_PERSONAL[kind]}, which a model may learn and repeat"),
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
        "exact": ("error", "stand word for word in", "scores on {} are too good"),
        "near": ("warning", f"stand nearly (similarity {threshold:g} or more) in", "scores on {} may be too good"),
        "id": ("error", "share their id with a row of", "a dialogue may stand in both"),
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


def _listed(items: Sequence) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more


def _bar(value: int, most: int) -> str:
    eighths = max(round(8 * WIDTH * value / most), bool(value))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
