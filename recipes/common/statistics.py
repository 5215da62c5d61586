"""How sure a difference is: bootstrap intervals and paired tests over held-out items, and curves over the amount of data. Numpy only.

Every score here is a function of sums over items: a loss is nats / tokens, an accuracy is hits / rows, corpus BLEU is a function of summed
n-gram counts. An item brings a row of such counts, `counts` (items, k), so a resample is a weighted sum and costs one matrix product for
all resamples together. `score` is a function from sums (..., k) to scores (...).
"""

from collections.abc import Callable

import numpy as np

LEVEL = 0.95


def draws(items: int, resamples: int, seed: int) -> np.ndarray:
    """How often each item is in each resample, (resamples, items): `items` draws with replacement (Efron, 1979).

    Whoever compares systems hands the same draws to each: that is what makes the test paired.
    """
    return np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=resamples).astype(np.float64)


def resample(counts: list[np.ndarray], score: Callable, drawn: np.ndarray, seed: int = 0) -> np.ndarray:
    """The score of a system on each resample, (resamples,): the mean over its runs with different seeds, one `counts` (items, k) each.

    With several runs, their own spread goes in too: the runs are drawn with replacement, their deviations from the mean widened by
    sqrt(runs / (runs - 1)), without which so few draws would vary too little. With one run only the choice of items is accounted for.
    """
    values = np.mean([score(drawn @ run) for run in counts], axis=0)
    if len(counts) > 1:
        each = np.array([score(run.sum(0)) for run in counts])
        chosen = np.random.default_rng([seed, len(drawn)]).integers(len(counts), size=(len(drawn), len(counts)))
        values = values + (each - each.mean())[chosen].mean(1) * np.sqrt(len(counts) / (len(counts) - 1))
    return values


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of resampled scores. NaN where a resample has none."""
    if not np.isfinite(values).all():
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float:
    """Of resampled paired differences between two systems: how likely one as far from 0 is if the systems are equally good, two-sided.

    The share of resamples that turn the winner round (Koehn, 2004, aclanthology.org/W04-3250), doubled for both sides; never 0, as a
    finite number of resamples can't tell. 1, no evidence, where a resample has no score.
    """
    if not np.isfinite(differences).all():
        return 1.0
    side = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (side + 1) / (len(differences) + 1)))


def holm(p_values: list[float]) -> list[float]:
    """p-values of several comparisons, corrected so that any false alarm among them stays as rare as for one (Holm, 1979)."""
    order, corrected, largest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for position, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[i]))
        corrected[i] = largest
    return corrected


# What more data would bring

EXPONENTS = np.linspace(0.05, 2, 79)


def power_law(sizes: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Fit error = a + b size^-c (Hestness et al., 2017, arXiv:1712.00409) by least squares to each row of `errors` (curves, sizes).

    Returns (curves, 3): a >= 0, b >= 0, c of a grid between 0.05 and 2. A curve that does not fall gets b = 0. Raises ValueError for
    fewer than three sizes, which fit any number of such curves.
    """
    if len(set(sizes)) < 3:
        raise ValueError(f"{len(set(sizes))} sizes can't hold a curve of three numbers: give three or more")
    best, found = np.full(len(errors), np.inf), np.zeros((len(errors), 3))
    for c in EXPONENTS:
        x = (sizes / sizes.max()) ** -c  # scaled: the numbers stay near 1
        centred = x - x.mean()
        b = np.maximum(0, errors @ centred / (centred @ centred))
        a = errors.mean(1) - b * x.mean()
        through_zero = a < 0
        b = np.where(through_zero, errors @ x / (x @ x), b)
        a = np.where(through_zero, 0, a)
        squares = ((errors - a[:, None] - b[:, None] * x) ** 2).sum(1)
        better = squares < best
        best = np.where(better, squares, best)
        found[better] = np.column_stack([a, b * sizes.max() ** c, np.full(len(errors), c)])[better]
    return found


def predict(fits: np.ndarray, size: float) -> np.ndarray:
    """The error that each of `fits` (curves, 3) has at `size`, (curves,)."""
    a, b, c = fits.T
    return a + b * size**-c
