"""Sets of classes: thresholds by hand, promises within the binomial interval over many splits, and cells of classes."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from confidence_ride_bf import Confidence
from ride_bf.evaluation.confidence import calibrate
from ride_bf.evaluation.conformal import fewest_images, lower_threshold, make_cells, threshold_for_each_class
from ride_bf.evaluation.metrics import shot_groups

COUNTS = [200, 150, 60, 30, 10, 5]
GROUPS = shot_groups(COUNTS)
SPLITS = 200


def drawn(images_of_class, seed):
    """Logits (N, C) that are the less sure of a class, the rarer it is, and labels (N,).

    The likeliest class is right less often than any promise here: else the sets, which always hold it, cover more.
    """
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), images_of_class)
    logits = generator.normal(size=(len(labels), 6))
    logits[np.arange(len(labels)), labels] += np.linspace(1.5, 0.3, 6)[labels]
    return torch.from_numpy(logits).float(), torch.from_numpy(labels)


def coverage_of_splits(images, coverage, by, classes):
    """How many of the test images of `classes`, one drawn a split, are covered: independent draws, so a binomial."""
    covered = 0
    for split in range(SPLITS):
        logits, labels = drawn(images, split)
        confidence, _ = calibrate(logits, labels, COUNTS, "validation", coverage, by)
        logits, labels = drawn([40] * 6, 10_000 + split)
        row = np.random.default_rng(split).choice(np.flatnonzero(np.isin(labels, classes)))
        covered += bool(confidence.prediction_sets(logits)[row, labels[row]])
    return covered


def test_the_threshold_by_hand():
    scores = np.arange(1, 20) / 20  # 19 of them
    assert lower_threshold(scores, 0.9) == 2 / 20  # the floor(20 * 0.1)-th
    assert lower_threshold(scores[::-1], 0.95) == 1 / 20
    assert lower_threshold(scores[:9], 0.9) == 1 / 20
    with pytest.raises(ValueError, match=r"8 calibration images cannot promise 90 %, at most 88\.9 %; at least 9 are"):
        lower_threshold(scores[:8], 0.9)
    assert [fewest_images(coverage) for coverage in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]


def test_a_set_by_hand():
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.34, 0.33, 0.33]]).log()
    assert Confidence(coverage=0.9, set_thresholds=0.26).prediction_sets(logits).tolist() == [
        [True, True, False],
        [True, True, False],
        [True, True, True],
    ]
    by_class = Confidence(temperature=3.0, coverage=0.9, set_thresholds=[0.7, 0.5, 0.2])
    # the likeliest class is in the set whatever its threshold, and the temperature decides nothing
    assert by_class.prediction_sets(logits).tolist() == [
        [True, False, False],
        [True, False, True],
        [True, False, True],
    ]
    with pytest.raises(ValueError, match=r"no sets of classes: run python -m ride_bf\.calibrate"):
        Confidence().prediction_sets(logits)


@pytest.mark.parametrize("by", ["all", "group"])
@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_the_promise_holds_over_many_splits(by, coverage, monkeypatch):
    """Of images of all classes; of a group, when it is promised by group. Calibration and test images are alike."""
    monkeypatch.setattr("ride_bf.evaluation.confidence.choose_temperatures", lambda *given, **others: UNSCALED)
    parts = [range(6)] if by == "all" else [np.flatnonzero(mask) for mask in GROUPS.values()]
    for classes in parts:
        covered = coverage_of_splits([20] * 6, coverage, by, classes)
        # the promise, and not more than 1 / (n + 1) above it for the fewest images of a cell, n = 40
        assert binom.cdf(covered, SPLITS, coverage) > 1e-3
        assert binom.sf(covered - 1, SPLITS, min(coverage + 1 / 41, 1)) > 1e-3


def test_without_groups_rare_classes_are_covered_less():
    """Why the default is by group."""
    logits, labels = drawn([500] * 6, 0)
    coverages = {}
    for by in ("all", "group"):
        confidence, _ = calibrate(logits, labels, COUNTS, "validation", 0.8, by)
        test, own = drawn([500] * 6, 1)
        covered = confidence.prediction_sets(test).gather(1, own[:, None]).squeeze(1).numpy()
        coverages[by] = {name: covered[mask[own]].mean() for name, mask in GROUPS.items()}
    assert coverages["all"]["few"] < 0.7 < 0.85 < coverages["all"]["many"]
    for coverage in coverages["group"].values():
        assert coverage == pytest.approx(0.8, abs=0.04)


def test_each_class_is_covered_if_it_has_images_enough():
    logits, labels = drawn([500] * 6, 0)
    confidence, record = calibrate(logits, labels, COUNTS, "validation", 0.9, "class")
    assert [cell["name"] for cell in record["sets"]["cells"]] == [f"class {label}" for label in range(6)]
    test, own = drawn([500] * 6, 1)
    covered = confidence.prediction_sets(test).gather(1, own[:, None]).squeeze(1).numpy()
    for label in range(6):
        assert covered[own == label].mean() == pytest.approx(0.9, abs=0.04)


def cells(images, coverage, by):
    logits, labels = drawn(images, 0)
    scores = logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1).numpy()
    found = make_cells(scores, labels.numpy(), GROUPS, coverage, by)
    assert sorted(label for cell in found for label in cell.classes) == list(range(6))
    return scores, labels.numpy(), {cell.name: cell for cell in found}


def test_classes_with_few_images_share_a_threshold_with_classes_like_them():
    """At 90 %: 500 images are enough for a class, 30 for a share in a cluster, and 4 for the group's threshold."""
    _, _, found = cells([500, 30, 30, 30, 30, 4], 0.9, "class")
    clustered = [cell for name, cell in found.items() if "cluster" in name]
    assert found["class 0"].images == 500
    assert sorted(label for cell in clustered for label in cell.classes if label in (1, 2, 3, 4)) == [1, 2, 3, 4]
    assert "few-shot" not in found  # 4 images promise at most 80 %: merged with a cluster
    (with_rare,) = (cell for cell in found.values() if 5 in cell.classes)
    assert "few-shot" in with_rare.name
    assert len(with_rare.classes) > 1
    assert sum(cell.images for cell in found.values()) == 500 + 4 * 15 + 4  # half of 30 decided on the clusters


def test_clusters_hold_classes_whose_scores_are_alike():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 60)
    scores = generator.uniform(size=360) * np.where(labels % 2 == 0, 1.0, 0.2)
    found = make_cells(scores, labels, GROUPS, 0.9, "class")
    assert sorted(cell.classes for cell in found) == [[0, 2, 4], [1, 3, 5]]


def test_a_group_with_too_few_images_is_merged_with_the_smallest_other():
    scores, labels, found = cells([20, 20, 15, 15, 3, 3], 0.9, "group")
    assert set(found) == {"many-shot", "few-shot + medium-shot"}
    merged = found["few-shot + medium-shot"]
    assert merged.classes == [2, 3, 4, 5]
    assert merged.images == 36
    assert merged.threshold == np.sort(scores[labels >= 2])[2]  # the floor(37 * 0.1)-th
    thresholds = threshold_for_each_class(list(found.values()), 6)
    assert thresholds[0] == thresholds[1] == pytest.approx(found["many-shot"].threshold, rel=1e-4)
    assert thresholds[2] == thresholds[5] == pytest.approx(merged.threshold, rel=1e-4)
    _, _, one = cells([1] * 6, 0.8, "group")
    assert [cell.images for cell in one.values()] == [6]
    with pytest.raises(
        ValueError, match=r"6 calibration images cannot promise 90 %, at most 85\.7 %.*lower --coverage"
    ):
        cells([1] * 6, 0.9, "group")


UNSCALED = {}


@pytest.fixture(autouse=True, scope="module")
def unscaled():
    from ride_bf.evaluation.calibration import GroupTemperature

    UNSCALED["all"] = GroupTemperature(images=1, temperature=1.0, losses=None, used="none")
