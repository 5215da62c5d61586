"""Intervals, paired tests and curves against closed forms, and the counts of items against the metrics that they must add up to."""

import itertools
import math

import numpy as np
import pytest
from conftest import ROOT

from recipes.common import item_scores, metrics, statistics


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def with_ones(values):
    return np.column_stack([values, np.ones(len(values))])


# Bootstrap


def test_draws_are_resamples_of_the_items():
    drawn = statistics.draws(7, 500, seed=1)
    assert drawn.shape == (500, 7) and (drawn.sum(1) == 7).all() and (drawn >= 0).all()
    assert (drawn == statistics.draws(7, 500, seed=1)).all() and (drawn != statistics.draws(7, 500, seed=2)).any()
    assert drawn.mean(0) == pytest.approx(1, abs=0.15)  # its deviation is sqrt(6 / 7 / 500) = 0.04


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    """The standard error of a resampled mean is the population deviation over sqrt(n) (Efron and Tibshirani, 1993, equation 5.12)."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    resampled = statistics.resample([with_ones(values)], mean, statistics.draws(400, 4000, 0))
    error = values.std() / math.sqrt(400)
    assert resampled.std() == pytest.approx(error, rel=0.05)
    low, high = statistics.interval(resampled)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.25 * error)


def test_the_interval_of_three_items_is_exact():
    """All 27 resamples of (0, 0, 1): the mean is 0 in 8, 1/3 in 12, 2/3 in 6, 1 in 1 of them."""
    every = np.array([np.bincount(chosen, minlength=3) for chosen in itertools.product(range(3), repeat=3)], dtype=float)
    found = statistics.resample([with_ones([0, 0, 1])], mean, every)
    assert sorted(np.round(found, 3)) == [0] * 8 + [0.333] * 12 + [0.667] * 6 + [1]
    share = (statistics.resample([with_ones([0, 0, 1])], mean, statistics.draws(3, 20000, 0)) == 0).mean()
    assert share == pytest.approx(8 / 27, abs=0.02)


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator, hits = np.random.default_rng(3), 0
    drawn = statistics.draws(80, 500, 0)
    for _ in range(300):
        low, high = statistics.interval(statistics.resample([with_ones(generator.exponential(1, 80))], mean, drawn))
        hits += low <= 1 <= high
    assert 0.90 <= hits / 300 <= 0.97  # skewed values: a little under 95 %


def test_seeds_widen_the_interval_by_their_own_spread():
    """Two runs of equal items that differ by a constant d: the variance of their mean is that of the items plus d^2 / 2 / 2."""
    values, drawn = np.random.default_rng(0).normal(0, 1, 200), statistics.draws(200, 4000, 0)
    alone = statistics.resample([with_ones(values)], mean, drawn)
    same = statistics.resample([with_ones(values)] * 3, mean, drawn)
    assert same == pytest.approx(alone)
    apart = statistics.resample([with_ones(values), with_ones(values + 1)], mean, drawn)
    assert apart.mean() == pytest.approx(values.mean() + 0.5, abs=0.03)
    assert apart.var() == pytest.approx(alone.var() + 1 / 4, rel=0.1)


def test_scores_that_are_no_number_give_no_interval():
    assert all(map(math.isnan, statistics.interval(np.array([1.0, math.nan, 2.0]))))
    assert all(map(math.isnan, statistics.interval(np.array([1.0, math.inf]))))


# Tests


def test_p_values_of_known_differences():
    assert statistics.p_value(np.ones(999)) == pytest.approx(2 / 1000)
    assert statistics.p_value(np.zeros(999)) == 1
    assert statistics.p_value(np.array([1.0] * 900 + [-1.0] * 99)) == pytest.approx(0.2)
    assert statistics.p_value(np.array([1.0, -1.0] * 500)) == 1
    assert statistics.p_value(np.array([1.0] * 999 + [math.nan])) == 1


def test_the_paired_test_agrees_with_the_z_test():
    """For the mean of many items, p is 2 (1 - Phi(|mean| / standard error)) of the differences."""
    generator = np.random.default_rng(5)
    base = generator.normal(0, 5, 500)
    drawn = statistics.draws(500, 20000, 0)
    for shift in (0.05, 0.1, 0.2):
        other = base + generator.normal(shift, 1, 500)
        difference = other - base
        z = difference.mean() / (difference.std() / math.sqrt(500))
        p = statistics.p_value(statistics.resample([with_ones(other)], mean, drawn) - statistics.resample([with_ones(base)], mean, drawn))
        assert p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.03)


def test_equal_systems_are_rarely_told_apart_and_pairing_is_what_sees_small_differences():
    generator, drawn, alarms = np.random.default_rng(7), statistics.draws(100, 500, 0), 0
    for _ in range(300):
        a, b = generator.normal(0, 1, (2, 100))
        difference = statistics.resample([with_ones(a)], mean, drawn) - statistics.resample([with_ones(b)], mean, drawn)
        alarms += statistics.p_value(difference) < 0.05
    assert alarms / 300 < 0.09
    a = generator.normal(0, 5, 100)
    b = a + generator.normal(0.3, 0.5, 100)  # much smaller than the items' own spread
    a_, b_ = (statistics.resample([with_ones(x)], mean, drawn) for x in (a, b))
    unpaired = statistics.resample([with_ones(b)], mean, statistics.draws(100, 500, 9))
    assert statistics.p_value(b_ - a_) < 0.01 and statistics.p_value(unpaired - a_) > 0.2


def test_holm():
    """By hand: sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, and never below the one before."""
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.5, 0.6]) == [1.0, 1.0] and statistics.holm([0.02]) == [0.02] and statistics.holm([]) == []


# Curves


def test_a_power_law_is_found_again():
    sizes = np.array([100.0, 200, 400, 800, 1600])
    for a, b, c in ((1.0, 8.0, 0.5), (0.0, 3.0, 0.3), (2.0, 50.0, 1.0)):
        fit = statistics.power_law(sizes, (a + b * sizes**-c)[None])
        assert statistics.predict(fit, 6400.0)[0] == pytest.approx(a + b * 6400**-c, rel=1e-3)
        assert fit[0] == pytest.approx([a, b, c], rel=0.02, abs=0.02)


def test_a_curve_that_does_not_fall_promises_nothing():
    fits = statistics.power_law(np.array([1.0, 2, 4]), np.array([[3.0, 3, 3], [1, 2, 3], [3, 2, 1.5]]))
    assert fits[0, 1] == pytest.approx(0, abs=1e-9) and fits[1, 1] == 0 and fits[2, 1] > 0
    assert statistics.predict(fits, 8.0)[:2] == pytest.approx([3, 2])


def test_two_sizes_are_no_curve():
    with pytest.raises(ValueError, match="2 sizes"):
        statistics.power_law(np.array([1.0, 2.0]), np.ones((1, 2)))


# Items


TEXTS = [{"row": 0, "language": "en", "reference": "It arrives on Friday, I am sure.", "x": "It arrives on Friday, I hope so."},
         {"row": 0, "language": "en", "reference": "What is its number, please?", "x": "What is your number, please?"},
         {"row": 2, "language": "zh", "reference": "好的，请告诉我订单号。", "x": "好的，请您告诉我订单号吧。"},
         {"row": 3, "language": "en", "reference": "You are welcome, have a nice day.", "x": ""}]


def test_counts_of_texts_add_up_to_the_corpus_scores():
    losses = {"0": [30.0, 12], "2": [8.0, 5], "3": [2.5, 4]}
    counts = item_scores.counts("chat", TEXTS, losses, "x")
    whole = metrics.score_replies([t["x"] for t in TEXTS], [t["reference"] for t in TEXTS], [t["language"] for t in TEXTS])["all"]
    for name in ("bleu", "chrf", "rougeL"):
        assert counts[name].shape[0] == 3, "the turns of a dialogue are one item"
        assert item_scores.METRICS[name].score(counts[name].sum(0)) == pytest.approx(whole[name])
    assert whole["bleu"] > 1
    assert item_scores.METRICS["loss"].score(counts["loss"].sum(0)) == pytest.approx(40.5 / 21)
    assert item_scores.METRICS["perplexity"].score(counts["perplexity"].sum(0)) == pytest.approx(math.exp(40.5 / 21))
    part = metrics.score_replies([t["x"] for t in TEXTS[:2]], [t["reference"] for t in TEXTS[:2]], ["en", "en"])["all"]
    drawn = np.array([[1.0, 0, 0], [1, 1, 1]])  # resampled as the first dialogue alone, then as they are
    assert item_scores.METRICS["bleu"].score(drawn @ counts["bleu"]) == pytest.approx([part["bleu"], whole["bleu"]])


def test_several_references_count_the_best_one():
    lines = [{"row": 0, "language": "en", "references": ["the cat sat on the mat", "a cat is on a mat"], "x": "a cat is on a mat"}]
    counts = item_scores.counts("translate", lines, {}, "x")
    assert [float(item_scores.METRICS[name].score(counts[name].sum(0))) for name in ("bleu", "rougeL")] == pytest.approx([100, 100])
    assert "loss" not in counts


def test_counts_of_labels_and_tags_add_up_to_their_reports():
    pairs = [("a", "a"), ("b", "a"), ("b", "b"), ("c", "a"), ("b", "b")]
    lines = [{"row": i, "label": right, "x": own} for i, (own, right) in enumerate(pairs)]
    counts = item_scores.counts("classify", lines, {str(i): [1.0, 1] for i in range(5)}, "x")
    report = metrics.classification_report(*zip(*pairs, strict=True))
    assert item_scores.METRICS["accuracy"].score(counts["accuracy"].sum(0)) == pytest.approx(100 * report["accuracy"])
    assert item_scores.METRICS["f1_macro"].score(counts["f1_macro"].sum(0)) == pytest.approx(100 * report["macro avg"]["f1-score"])
    tags = [(["B-x", "I-x", "O"], ["B-x", "O", "O"]), (["B-y", "O"], ["B-y", "O"]), (["O"], ["B-x"])]
    counts = item_scores.counts("tag", [{"row": i, "tags": right, "m": own} for i, (own, right) in enumerate(tags)], {}, "m")
    report = metrics.span_report(*zip(*tags, strict=True))
    assert item_scores.METRICS["f1"].score(counts["f1"].sum(0)) == pytest.approx(100 * report["micro avg"]["f1-score"])


def test_each_task_has_a_main_metric():
    assert {path.stem for path in (ROOT / "recipes/common/tasks").glob("[!_]*.py")} <= item_scores.OF_TASK.keys()
    assert all(set(names) <= item_scores.METRICS.keys() for names in item_scores.OF_TASK.values())
