"""Metrics on cases worked out by hand, on degenerate input, and against published baselines of real test sets."""

import csv
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from utils.common import REPO_ROOT, UserError
from utils.metrics import (
    METRICS,
    baseline_predictions,
    bootstrap_interval,
    evaluate,
    evaluate_intervals,
    sample_iou,
    sample_scores,
)

ANNOTATIONS = REPO_ROOT.parent / "shared" / "annotations"


def sample(gt, pred, qid=0, duration=60.0):
    return {"qid": qid, "gt": gt, "pred": pred, "duration": duration}


def numbered(*pairs):
    return [sample(gt, pred, qid) for qid, (gt, pred) in enumerate(pairs)]


def test_worked_example():
    samples = numbered(
        ([[10, 20]], [[10, 20]]),  # 1
        ([[10, 20]], [[10, 15]]),  # 0.5
        ([[10, 20]], [[10, 13]]),  # 0.3
        ([[10, 20]], [[30, 40]]),  # 0
        ([[10, 20]], None),  # unparsable
        ([[10, 20]], []),  # says absent, is there
        ([], []),  # absent, and says so
        ([], [[1, 2]]),  # absent, but a window
        ([], None),  # absent, unparsable
    )
    result = evaluate(samples)
    assert result["mIoU"] == pytest.approx(100 * 1.8 / 6, abs=1e-12)
    assert result["R1@0.3"] == 50.0
    assert result["R1@0.5"] == pytest.approx(100 * 2 / 6, abs=1e-12)
    assert result["R1@0.7"] == pytest.approx(100 / 6, abs=1e-12)
    assert result["absent_accuracy"] == pytest.approx(100 / 3, abs=1e-12)
    assert result["parse_failure_rate"] == pytest.approx(100 * 2 / 9, abs=1e-12)
    counts = {key: value for key, value in result.items() if key.startswith("num_")}
    assert counts == {
        "num_samples": 9,
        "num_grounded": 6,
        "num_absent": 3,
        "num_parse_failures": 2,
        "num_answered_absent": 2,
    }


@pytest.mark.parametrize(("end", "threshold"), [(3, 0.3), (5, 0.5), (7, 0.7)])
def test_a_threshold_that_is_just_met_counts(end, threshold):
    met, missed = sample([[0, 10]], [[0, end]]), sample([[0, 10]], [[0, end - 0.01]])
    assert sample_iou(met) == threshold
    assert sample_scores(met)[f"R1@{threshold}"] == 1.0
    assert sample_scores(missed)[f"R1@{threshold}"] == 0.0


def test_first_prediction_with_its_best_window():
    assert sample_iou(sample([[0, 4], [10, 20]], [[12, 20], [0, 4]])) == 0.8
    assert sample_iou(sample([[10, 20], [0, 4]], [[50, 60], [0, 4]])) == 0.0
    assert sample_iou(sample([[10, 20]], [[10, 20, 0.37]])) == 1.0  # a score beside the window changes nothing


@pytest.mark.parametrize(
    "window", [[math.nan, 15], [10, math.nan], [10, math.inf], [-math.inf, 15], [12, 12], [15, 10], [-5, -1]]
)
def test_degenerate_windows_score_zero_as_prediction_and_as_label(window):
    as_prediction = sample([[10, 20]], [window])
    as_label = sample([window], [[10, 20]])
    same = sample([window], [window]) if window != [-5, -1] else as_label
    for case in (as_prediction, as_label, same):
        assert sample_iou(case) == 0.0
    assert evaluate([as_prediction])["num_grounded"] == 1
    assert evaluate([as_label])["mIoU"] == 0.0


def test_no_samples_give_nan_and_zero_counts():
    result = evaluate([])
    assert all(math.isnan(result[name]) for name in METRICS)
    assert [value for name, value in result.items() if name.startswith("num_")] == [0] * 5


def test_keys_are_stable_and_averages_over_nothing_are_nan():
    only_absent, only_grounded = evaluate([sample([], [])]), evaluate([sample([[0, 1]], [[0, 1]])])
    assert set(only_absent) == set(only_grounded) == set(evaluate([]))
    assert math.isnan(only_absent["mIoU"]) and only_absent["absent_accuracy"] == 100.0
    assert math.isnan(only_grounded["absent_accuracy"]) and only_grounded["mIoU"] == 100.0


def random_samples(count, seed):
    generator = random.Random(seed)
    samples = []
    for qid in range(count):
        start, length = generator.uniform(0, 50), generator.uniform(0.1, 10)
        shift = generator.uniform(-5, 5)
        pred = generator.choice([None, [], *[[[start + shift, start + length]]] * 6])
        samples.append(sample([] if generator.random() < 0.1 else [[start, start + length]], pred, qid))
    return samples


@pytest.mark.parametrize("seed", range(5))
def test_order_never_matters(seed):
    samples = random_samples(500, seed)
    shuffled = random.Random(99).sample(samples, len(samples))
    assert evaluate(samples) == evaluate(shuffled)  # to the last bit
    assert evaluate_intervals(samples, num_resamples=50) == evaluate_intervals(shuffled, num_resamples=50)


def test_intervals_hold_the_averages():
    samples = random_samples(300, 7)
    averages, intervals = evaluate(samples), evaluate_intervals(samples, num_resamples=200)
    assert set(intervals) == set(METRICS)
    for name, (low, high) in intervals.items():
        assert low < averages[name] < high


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"qid": "q7", "gt": None, "pred": [], "duration": 9}, ["'q7'", "not labelled", "leave such rows out"]),
        ({"qid": "q7", "gt": [[1, 2]], "duration": 9}, ["'q7'", "'pred'"]),
        ({"qid": "q7", "gt": [1, 2], "pred": [], "duration": 9}, ["'q7'", "gt", "[start, end]", "[1, 2]"]),
        ({"qid": "q7", "gt": [[1, 2]], "pred": [["1", "b"]], "duration": 9}, ["'q7'", "pred"]),
        ({"qid": "q7", "gt": [[1, 2]], "pred": [[1]], "duration": 9}, ["'q7'", "pred"]),
        ({"qid": "q7", "gt": [], "pred": 3.0, "duration": 9}, ["'q7'", "pred"]),
        ({"gt": [[1, 2]], "pred": [], "duration": 9}, ["'qid'"]),
    ],
)
def test_malformed_samples_are_named(bad, words):
    with pytest.raises(UserError) as error:
        evaluate([bad])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_query_scored_twice_is_refused():
    with pytest.raises(UserError, match="qid 3 occurs more than once"):
        evaluate([sample([[0, 1]], [], 3), sample([[0, 1]], [[0, 1]], 3)])


def test_bootstrap_interval_matches_theory():
    values = [1.0] * 200 + [0.0] * 200  # standard error of the mean 0.025, so 0.5 -/+ 1.96 * 0.025
    low, high = bootstrap_interval(values, num_resamples=4000)
    assert low == pytest.approx(0.451, abs=0.005)
    assert high == pytest.approx(0.549, abs=0.005)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.674 * 0.025, abs=0.004)


def test_bootstrap_interval_is_seeded_and_ignores_order():
    values = np.random.default_rng(1).uniform(size=50)
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1])
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_bootstrap_interval_of_one_and_of_none():
    assert bootstrap_interval([0.4]) == (0.4, 0.4)
    assert all(math.isnan(bound) for bound in bootstrap_interval([]))


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([1.0, math.nan], {}, "finite"),
        ([1.0], {"confidence": 95}, "write 0.95"),
        ([1.0], {"confidence": 1.0}, "between 0 and 1"),
        ([1.0], {"num_resamples": 0}, "at least 1"),
    ],
)
def test_bootstrap_interval_refuses(values, options, words):
    with pytest.raises(UserError, match=words):
        bootstrap_interval(values, **options)


def test_baselines():
    samples = [sample([[10, 20]], [[1, 2]], duration=40.0)]
    whole, centre = baseline_predictions(samples, "whole_video"), baseline_predictions(samples, "centre")
    assert whole[0]["pred"] == [[0.0, 40.0]] and evaluate(whole)["mIoU"] == 25.0
    assert centre[0]["pred"] == [[10.0, 30.0]] and evaluate(centre)["mIoU"] == 50.0
    assert samples[0]["pred"] == [[1, 2]]  # the model's own answers stay


@pytest.mark.parametrize("duration", [0, -1.0, math.nan, math.inf, "40", None])
def test_baselines_need_a_duration(duration):
    with pytest.raises(UserError, match="duration must be a number above 0"):
        baseline_predictions([sample([[0, 1]], [], duration=duration)], "whole_video")


def test_unknown_baseline_lists_the_choices():
    with pytest.raises(UserError, match="whole_video, centre"):
        baseline_predictions([], "middle")


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the published annotations are not on this machine")
def test_whole_video_on_charades_sta_is_the_published_27():
    with open(ANNOTATIONS / "charades_sta" / "Charades_v1_test.csv", newline="") as handle:
        lengths = {row["id"]: float(row["length"]) for row in csv.DictReader(handle)}
    lines = (ANNOTATIONS / "charades_sta" / "charades_sta_test.txt").read_text().splitlines()
    samples = []
    for number, line in enumerate(lines):
        video, start, end = line.split("##")[0].split()
        samples.append(sample([[float(start), float(end)]], None, number, lengths[video]))
    assert len(samples) == 3720
    assert evaluate(baseline_predictions(samples, "whole_video"))["mIoU"] == pytest.approx(27.0, abs=0.05)


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="the published annotations are not on this machine")
def test_whole_video_on_activitynet_captions():
    videos = json.loads((ANNOTATIONS / "activitynet_captions" / "val_2.json").read_text())
    samples = [
        sample([sorted(window)], None, (name, number), video["duration"])
        for name, video in videos.items()
        for number, window in enumerate(video["timestamps"])
    ]
    assert len(samples) == 17031
    assert evaluate(baseline_predictions(samples, "whole_video"))["mIoU"] == pytest.approx(34.6, abs=0.05)


def test_metrics_import_without_torch():
    code = "import sys, utils.metrics; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT).returncode == 0
