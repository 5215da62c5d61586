"""Texts that stand twice, exactly or nearly: within a data set, and across train, dev and test, where they make scores too good.

Similarity is the Jaccard index of two texts' sets of shingles (see `shingles`). Comparing all pairs is quadratic, so candidates come
from MinHash signatures cut into bands (Broder, 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3), and each
candidate is then checked by its exact Jaccard index: what is reported is never wrong. What is missed: a pair right at the threshold
with a probability below 0.2 %, a more similar one less.

Memory: about 0.5 KB for each different text, which itself is looked up when it is needed. Time grows with the number of texts, not of
pairs.
"""

import functools
import hashlib
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rensa import RMinHash

SLOTS = 128           # of a signature, 4 bytes each
MISSED = 1e-3         # chance that a pair right at the threshold shares no band
MOST_COMPARED = 1000  # texts that one text is held against in one band; some corpora have endless look-alikes just below the threshold
_SEED = 42
_CHUNK = 1024         # texts whose shingles are in memory at once

# Runs of what is written without spaces (radicals, kana, ideographs, hangul), and of everything else.
_DIGITS = re.compile(r"[0-9]+")
_RUNS = re.compile("([\u2e80-\u2fff\u3040-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]+)")


@dataclass(frozen=True)
class Duplicates:
    """Groups of indices, each ascending, ordered by their first index; a group has at least two."""

    exact: list[list[int]]   # the same text but for case, width and blanks
    groups: list[list[int]]  # linked by an exact or a near duplicate, perhaps over a third text: A ~ B and B ~ C put A beside C
    comparisons: int         # exact Jaccard indices that were computed
    skipped: int             # times that a text was not held against all in its band, being more than MOST_COMPARED


@dataclass(frozen=True)
class Leak:
    """Row `row` (index) of `split` that stands in an earlier split too, as its row `of_row`."""

    split: str
    row: int
    of_split: str
    of_row: int
    kind: str          # "id": the same id; "exact": the same text but for case, width and blanks; "near": a similar text
    similarity: float  # Jaccard index of the two texts, 0-1


@dataclass(frozen=True)
class Leaks:
    """What `leaks` found, and what it took: see `Duplicates`."""

    found: list[Leak]
    comparisons: int
    skipped: int


class Texts(Sequence):
    """The text (`row_text`) of each of `rows`, made when it is asked for: a million of them would fill the memory."""

    def __init__(self, rows: Sequence[dict]):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, at: int) -> str:
        return row_text(self._rows[at])


def shingles(text: str) -> set[str]:
    """The pieces by which texts are compared: of Han and other CJK runs every 2 characters in a row, of all else every 5.

    Two Han characters are about a word, as five letters are; three would make a short Chinese sentence with one changed character
    look like another. Case, full and half width, the number of blanks, and which number it is make no difference: a question about
    another order is nearly the same question. A run that is shorter is one piece.
    """
    pieces = set()
    for position, run in enumerate(_RUNS.split(_DIGITS.sub("0", _normal(text)))):
        size = 2 if position % 2 else 5
        pieces |= {run[i:i + size] for i in range(max(1, len(run) - size + 1))}
    return pieces - {"", " "}


def jaccard(a: set[str], b: set[str]) -> float:
    """Size of the intersection by size of the union, 0-1; 1 for two empty sets."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if a or b else 1.0


def row_text(row: dict) -> str:
    """The text of a row by which it is compared, a line each: its turns, or `text`, `text_pair`, `source`, `target`, `refs` and `tokens`.

    System turns are left out: a data set has few different ones, and they would make short dialogues look alike.
    """
    if "messages" in row:
        return "\n".join(turn["content"] for turn in row["messages"] if turn["role"] != "system")
    fields = [row[name] for name in ("text", "text_pair", "source", "target") if row.get(name) is not None]
    return "\n".join([*fields, *row.get("refs", ()), *([" ".join(row["tokens"])] if "tokens" in row else [])])


def digest(text: str) -> bytes:
    """16 bytes that texts have in common if they differ in nothing but case, width and blanks: keys of a fixed size for long texts."""
    return hashlib.blake2b(_normal(text).encode(), digest_size=16).digest()


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> Duplicates:
    """Texts with an equal or a similar one among `texts`: Jaccard index of at least `threshold` (0.1 to 1, else a ValueError)."""
    bands = _bands(threshold)
    exact = _exact_groups(texts)
    different = np.delete(np.arange(len(texts)), [i for group in exact for i in group[1:]])
    signatures = _signatures(texts, different, bands)
    likely, similarity = _likely(signatures, threshold), _similarity(texts, different)
    parents, comparisons, skipped = np.arange(len(different)), 0, 0

    def roots(indices: np.ndarray) -> np.ndarray:
        while (parents[indices] != indices).any():
            indices = parents[indices]
        return indices

    for bucket in _buckets(signatures, bands):
        group = roots(bucket)
        parents[bucket] = group  # keeps the way to the root short
        if (group == group[0]).all():
            continue
        for position, i in enumerate(bucket.tolist()):
            others = likely(i, bucket[max(0, position - MOST_COMPARED):position])
            while len(others := others[roots(others) != roots(bucket[position:position + 1])]):
                comparisons += 1
                if similarity(i, others[-1]) >= threshold:
                    parents[roots(bucket[position:position + 1])] = roots(others[-1:])
                others = others[:-1]
        if len(bucket) > MOST_COMPARED and len(set(roots(bucket).tolist())) > 1:
            skipped += len(bucket) - MOST_COMPARED
    of_copies, linked = {group[0]: group for group in exact}, []
    for positions in _equal(roots(parents)[:, None]):
        linked.append(sorted(i for first in different[positions].tolist() for i in of_copies.pop(first, [first])))
    return Duplicates(exact, sorted([*linked, *of_copies.values()]), comparisons, skipped)


def leaks(train: Sequence[dict], dev: Sequence[dict], test: Sequence[dict], threshold: float = 0.8) -> Leaks:
    """Rows of dev that also stand in train, and rows of test that also stand in train or dev. Rows as in data/README.md.

    For each row at most one leak by its text (the same text if there is one, else a similar one: Jaccard index of at least
    `threshold`, 0.1 to 1, else a ValueError) and one by its `id`.
    """
    names = ["train"] * len(train) + ["dev"] * len(dev) + ["test"] * len(test)
    parts = [part for part in (train, dev, test) if len(part)]
    rows = functools.reduce(operator.add, parts) if parts else []
    starts = {"train": 0, "dev": len(train), "test": len(train) + len(dev)}
    texts, found = Texts(rows), []

    def add(i: int, j: int, kind: str, similarity: float) -> None:
        found.append(Leak(names[i], i - starts[names[i]], names[j], j - starts[names[j]], kind, similarity))

    ids = {}
    for i, row in enumerate(rows):
        if row.get("id") is not None:
            j = ids.setdefault(str(row["id"]), i)  # nothing checks its type
            if j < starts[names[i]]:
                add(i, j, "id", jaccard(shingles(texts[i]), shingles(texts[j])))

    settled = set(range(len(train)))  # rows that need no further look
    for group in _exact_groups(texts):
        for i in group:
            if group[0] < starts[names[i]]:
                add(i, group[0], "exact", 1.0)
                settled.add(i)

    bands = _bands(threshold)
    every = np.arange(len(texts))
    signatures = _signatures(texts, every, bands)
    likely, similarity = _likely(signatures, threshold), _similarity(texts, every)
    comparisons = skipped = 0
    for bucket in _buckets(signatures, bands):
        for i in bucket[bucket >= len(train)].tolist():
            if i in settled:
                continue
            earlier = bucket[:np.searchsorted(bucket, starts[names[i]])]
            for j in likely(i, earlier[-MOST_COMPARED:]).tolist():
                comparisons += 1
                if similarity(i, j) >= threshold:
                    add(i, j, "near", similarity(i, j))
                    settled.add(i)
                    break
            else:
                skipped += len(earlier) > MOST_COMPARED
    found.sort(key=lambda leak: (starts[leak.split] + leak.row, leak.kind))
    return Leaks(found, comparisons, skipped)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _exact_groups(texts: Iterable[str]) -> list[list[int]]:
    """Ascending indices of equal texts together, in the order of their first one."""
    digests = np.frombuffer(b"".join(map(digest, texts)), dtype=np.uint64).reshape(-1, 2)
    return sorted(group.tolist() for group in _equal(digests))


def _equal(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The ascending indices of rows of the matrix `keys` that are equal, where there are several."""
    order = np.lexsort(keys.T)  # stable: equal rows keep their order
    borders = np.flatnonzero((keys[order[1:]] != keys[order[:-1]]).any(axis=1)) + 1
    starts, ends = np.append(0, borders), np.append(borders, len(order))
    for k in np.flatnonzero(ends - starts > 1):
        yield order[starts[k]:ends[k]]


def _bands(threshold: float) -> tuple[int, int]:
    """Number of bands and slots in each: the widest bands, and so the fewest candidates, that miss at most `MISSED` at `threshold`."""
    if not 0.1 <= threshold <= 1:
        raise ValueError(f"threshold must be between 0.1 and 1, not {threshold}")
    width = next(w for w in range(SLOTS, 0, -1) if (1 - threshold**w) ** (SLOTS // w) <= MISSED)
    return SLOTS // width, width


def _signatures(texts: Sequence[str], chosen: np.ndarray, bands: tuple[int, int]) -> np.ndarray:
    """MinHash signatures of the `chosen` texts, uint32 of shape (chosen, bands x width)."""
    signatures = np.empty((len(chosen), bands[0] * bands[1]), dtype=np.uint32)
    for start in range(0, len(chosen), _CHUNK):
        pieces = [list(shingles(texts[i])) for i in chosen[start:start + _CHUNK].tolist()]
        signatures[start:start + _CHUNK] = RMinHash.digest_matrix_from_token_sets(pieces, signatures.shape[1], _SEED).to_rows()
    return signatures


def _buckets(signatures: np.ndarray, bands: tuple[int, int]) -> Iterator[np.ndarray]:
    """Band by band, the ascending indices of texts that agree in all slots of the band; no bucket of one."""
    for band in range(bands[0]):
        yield from _equal(signatures[:, band * bands[1]:(band + 1) * bands[1]])


def _likely(signatures: np.ndarray, threshold: float) -> Callable[[int, np.ndarray], np.ndarray]:
    """A function from an index and others to those of the others that a look at the signatures does not rule out.

    A signature estimates the similarity; an estimate four standard deviations below the threshold isn't worth an exact comparison.
    """
    slots = signatures.shape[1]
    floor = slots * threshold - 4 * math.sqrt(slots * threshold * (1 - threshold))
    return lambda i, others: others[(signatures[others] == signatures[i]).sum(axis=1) >= floor]


def _similarity(texts: Sequence[str], chosen: np.ndarray) -> Callable[[int, int], float]:
    """A function from two positions in `chosen`, the indices of texts, to the Jaccard index of these texts."""
    pieces = functools.lru_cache(maxsize=4096)(lambda i: shingles(texts[int(chosen[i])]))  # bounded: the sets are far larger than the texts
    return lambda i, j: jaccard(pieces(i), pieces(j))
