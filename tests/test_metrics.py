import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, recall_score

from ride_bf.evaluation.metrics import (
    accuracy_weights,
    bootstrap,
    calibration,
    class_means,
    class_summary,
    class_wise_calibration,
    confidence_interval,
    confused_pairs,
    distribution_weights,
    effective_images,
    expected_calibration_error,
    expert_agreement,
    expert_use,
    mean_agreement,
    shot_accuracy,
    shot_groups,
    weighted_mean,
    wilson_interval,
    worst_classes,
)
from ride_bf.evaluation.tables import accuracy_table, shot_summary


def test_groups_at_their_boundaries():
    groups = shot_groups([101, 100, 20, 19])
    assert {name: members.tolist() for name, members in groups.items()} == {
        "many": [True, False, False, False],
        "medium": [False, True, True, False],
        "few": [False, False, False, True],
    }


def test_by_hand():
    counts = [500, 101, 100, 20, 19]
    labels = [0, 0, 0, 0, 1, 2, 2, 3, 4, 4]
    predictions = [0, 0, 0, 1, 0, 2, 3, 3, 4, 0]
    result = shot_accuracy(predictions, labels, counts)
    assert result == {
        "accuracy": 0.6,
        "balanced_accuracy": pytest.approx((0.75 + 0 + 0.5 + 1 + 0.5) / 5),
        "many_shot_accuracy": pytest.approx((0.75 + 0) / 2),
        "medium_shot_accuracy": pytest.approx((0.5 + 1) / 2),
        "few_shot_accuracy": 0.5,
        "per_class_accuracy": [0.75, 0.0, 0.5, 1.0, 0.5],
    }


def test_an_empty_group_is_left_out():
    result = shot_accuracy([0, 1], [0, 1], [5000, 50])
    assert "few_shot_accuracy" not in result
    assert result["many_shot_accuracy"] == result["medium_shot_accuracy"] == 1.0


def test_a_class_without_test_images_counts_in_no_mean():
    result = shot_accuracy([0, 0], [0, 0], [200, 150, 3])
    assert result["per_class_accuracy"] == [1.0, None, None]
    assert result["many_shot_accuracy"] == result["balanced_accuracy"] == 1.0
    assert "few_shot_accuracy" not in result


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "not empty"),
        ([0, 1], [0], "one length"),
        ([0, 3], [0, 1], "predictions range from 0 to 3"),
        ([0, 1], [-1, 1], "labels range from -1 to 1"),
    ],
)
def test_bad_input(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        shot_accuracy(predictions, labels, [5, 5, 5])


def test_report_shows_groups_and_classes_from_the_commonest():
    counts, names = [10, 300], ["rare", "common"]
    metrics = shot_accuracy([0, 1, 1, 1, 1], [0, 0, 1, 1, 1], counts)
    lines = [line.split() for line in accuracy_table(metrics, counts, names).splitlines()]
    assert lines[1] == ["all", "images", "2", "310", "80.0", "%"]
    assert lines[2] == ["balanced", "2", "310", "75.0", "%"]
    assert lines[3] == ["many-shot", "1", "300", "100.0", "%"]
    assert lines[4] == ["few-shot", "1", "10", "50.0", "%"]
    assert lines[-2:] == [["class", "common", "300", "100.0", "%"], ["class", "rare", "10", "50.0", "%"]]
    assert shot_summary(metrics) == "all images  80.0  balanced  75.0  many 100.0  few  50.0"


def test_expert_use_by_hand():
    assert expert_use([1, 1, 3, 2], [0, 0, 0, 1], [200, 5], num_experts=3) == {
        "experts_used": [0.5, 0.25, 0.25],
        "many_shot_experts_used": pytest.approx([2 / 3, 0, 1 / 3]),
        "few_shot_experts_used": [0.0, 1.0, 0.0],
    }


@pytest.fixture
def random_case():
    """Labels and predictions of 12 classes with few and many images each."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), generator.integers(2, 30, 12))
    predictions = np.where(generator.random(len(labels)) < 0.6, labels, generator.integers(0, 12, len(labels)))
    return predictions, labels


def test_as_scikit_learn_has_it(random_case):
    predictions, labels = random_case
    result = shot_accuracy(predictions, labels, [50] * 12)
    assert result["accuracy"] == pytest.approx((predictions == labels).mean())
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert result["per_class_accuracy"] == pytest.approx(recall_score(labels, predictions, average=None))
    matrix = confusion_matrix(labels, predictions)
    np.fill_diagonal(matrix, 0)
    pairs = confused_pairs(predictions, labels, 12, most=1000)
    assert len(pairs) == (matrix > 0).sum()
    assert all(pair["images"] == matrix[pair["true"], pair["predicted"]] for pair in pairs)
    assert [pair["images"] for pair in pairs] == sorted(matrix[matrix > 0], reverse=True)


def test_calibration_by_hand():
    confidences = np.array([0.1, 0.2, 0.25, 0.4, 0.9, 1.0])  # bins up to 0.2 0.4 0.6 0.8 1, ends included
    correct = np.array([False, True, False, False, True, True])
    bins = calibration(confidences, correct, num_bins=5)
    assert bins["count"] == [2, 2, 0, 0, 2]
    assert bins["confidence"] == [pytest.approx(0.15), pytest.approx(0.325), None, None, pytest.approx(0.95)]
    assert bins["accuracy"] == [0.5, 0.0, None, None, 1.0]
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.35 + 2 * 0.325 + 2 * 0.05) / 6)


def test_a_calibrated_classifier_has_no_calibration_error():
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.2, 1, 100_000)
    bins = calibration(confidences, generator.random(100_000) < confidences)
    assert expected_calibration_error(bins) < 0.01


def test_test_distributions_by_hand():
    weights = distribution_weights([5, 100, 20, 7], np.array([1, 3, 3, 0]))  # the last class has no test image
    assert list(weights) == [
        f"{name}_accuracy" for name in ("forward_50", "forward_25", "uniform", "backward_25", "backward_50")
    ]
    assert weights["forward_25_accuracy"].tolist() == pytest.approx([1 / 31, 25 / 31, 5 / 31, 0])
    assert weights["backward_25_accuracy"].tolist() == pytest.approx([25 / 31, 1 / 31, 5 / 31, 0])
    assert weights["forward_50_accuracy"][1] / weights["forward_50_accuracy"][0] == pytest.approx(50)
    assert weights["uniform_accuracy"].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_reweighting_equals_a_test_set_of_that_distribution():
    """25 : 5 : 1 images, of which the same shares are right as in the balanced test set."""
    counts = [300, 60, 12]
    weights = distribution_weights(counts, np.array([10, 10, 10]))["forward_25_accuracy"]
    right = {0: 0.8, 1: 0.4, 2: 0.0}
    labels = np.repeat([0, 1, 2], [25, 5, 1])
    correct = np.concatenate([np.arange(n) < right[label] * n for label, n in ((0, 25), (1, 5), (2, 1))])
    predictions = np.where(correct, labels, (labels + 1) % 3)
    expected = shot_accuracy(predictions, labels, counts)["accuracy"]
    assert weighted_mean(np.array(list(right.values())), weights) == pytest.approx(expected)


def test_the_bootstraps_variance_is_unbiased():
    """That of a stratified mean: the sum of w^2 s^2 / n, s^2 with n - 1, even for classes of three images."""
    values = np.array([1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0])
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    weights = np.array([0.5, 0.3, 0.2])
    resampled = bootstrap(values, labels, {"mean": weights}, resamples=200_000)["mean"]
    own = [values[labels == label] for label in range(3)]
    means = np.array([of.mean() for of in own])
    variances = np.array([of.var(ddof=1) / len(of) for of in own])
    assert resampled.mean() == pytest.approx(means @ weights, abs=2e-3)
    assert resampled.var() == pytest.approx(variances @ weights**2, rel=0.02)


def test_the_bootstrap_draws_outcomes_as_drawing_images_would(random_case):
    predictions, labels = random_case
    values = (predictions == labels).astype(int) - (predictions == (labels + 1) % 12)  # -1, 0 or 1
    weights = accuracy_weights([200] * 6 + [5] * 6, np.bincount(labels))
    resampled = bootstrap(values, labels, weights, resamples=4000)
    generator = np.random.default_rng(1)
    by_image = {name: [] for name in weights}
    for _ in range(4000):
        means = np.array(
            [generator.choice(own, len(own) - 1).mean() for own in (values[labels == label] for label in range(12))]
        )
        for name, own in weights.items():
            by_image[name].append(means @ own / own.sum())
    for name, values_by_image in by_image.items():
        assert confidence_interval(resampled[name]) == pytest.approx(
            confidence_interval(np.array(values_by_image)), abs=0.01
        )


def test_wilsons_interval():
    """The bounds are the shares that the score test at the level just rejects."""
    z = 1.959963984540054
    for share, images in ((1.0, 50), (0.0, 8), (0.9, 50), (0.5, 12.5)):
        low, high = wilson_interval(share, images)
        assert low <= share <= high
        for bound in (low, high):
            if 0 < bound < 1:
                assert (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / images)
    assert wilson_interval(1.0, 50)[0] == pytest.approx(0.9287, abs=1e-4)


def test_effective_images_are_the_images_if_each_counts_the_same():
    assert effective_images(np.array([10.0, 30.0]), np.array([10, 30])) == pytest.approx(40)
    assert effective_images(np.array([1.0, 1.0]), np.array([10, 30])) == pytest.approx(30)  # 4 / (1/10 + 1/30)
    assert effective_images(np.array([1.0, 0.0]), np.array([10, 0])) == pytest.approx(10)


def test_the_bootstrap_of_a_class_of_one_image_or_of_none():
    resampled = bootstrap(np.array([1]), np.array([1]), {"mean": np.array([0.0, 1.0])}, resamples=10)["mean"]
    assert resampled.tolist() == [1.0] * 10


def test_confusion_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 3])
    predictions = np.array([1, 1, 2, 0, 1, 0, 2, 2, 2, 3])
    assert confused_pairs(predictions, labels, 5) == [
        {"true": 0, "predicted": 1, "images": 2, "share": 0.5},
        {"true": 1, "predicted": 0, "images": 1, "share": 0.5},
        {"true": 0, "predicted": 2, "images": 1, "share": 0.25},
    ]
    assert worst_classes(predictions, labels, 5, most=1) == {
        "true": [0],
        "predicted": [0, 1],
        "shares": [[0.25, 0.5]],
        "other": [0.25],
    }
    everything = worst_classes(predictions, labels, 5)
    assert everything["true"] == everything["predicted"] == [0, 1, 2, 3]  # the last class has no images
    assert everything["other"] == [0, 0, 0, 0]


def test_agreement_by_hand():
    experts = np.array([[0, 0, 1], [1, 1, 1], [2, 0, -1], [3, -1, -1]])
    assert expert_agreement(experts).tolist() == [[1, 2 / 3, 0.5], [2 / 3, 1, 0.5], [0.5, 0.5, 1]]
    assert mean_agreement(experts) == pytest.approx((2 / 3 + 0.5 + 0.5) / 3)
    assert np.isnan(mean_agreement(experts[3:]))


def test_class_means_of_a_class_without_images():
    means, images = class_means(np.array([1.0, 0.0]), np.array([2, 2]), 3)
    assert np.isnan(means[:2]).all()
    assert (means[2], images.tolist()) == (0.5, [0, 0, 2])


def test_the_summary_of_the_classes_by_hand():
    """Accuracies 1/2, 1 and 1/4; the last class has no images and is left out, though it is predicted once."""
    labels = np.array([0, 0, 1, 1, 2, 2, 2, 2])
    predictions = np.array([0, 3, 1, 1, 2, 0, 0, 1])
    f1 = [2 * 1 / (2 + 3), 2 * 2 / (2 + 3), 2 * 1 / (4 + 1)]  # 2 tp / (images + predicted)
    assert class_summary(predictions, labels, 4) == {
        "macro_f1": pytest.approx(sum(f1) / 3),
        "harmonic_mean_accuracy": pytest.approx(3 / (2 + 1 + 4)),
        "geometric_mean_accuracy": pytest.approx((1 / 8) ** (1 / 3)),
        "worst_class_accuracy": 0.25,
        "worst_class": 2,
    }


def test_a_class_that_is_never_right_makes_the_means_zero(recwarn):
    found = class_summary(np.array([0, 0, 2]), np.array([0, 1, 2]), 3)
    assert found["harmonic_mean_accuracy"] == found["geometric_mean_accuracy"] == found["worst_class_accuracy"] == 0
    assert found["worst_class"] == 1
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert not recwarn.list


def test_macro_f1_as_scikit_learn_has_it(random_case):
    predictions, labels = random_case
    assert class_summary(predictions, labels, 12)["macro_f1"] == pytest.approx(
        f1_score(labels, predictions, average="macro")
    )


def test_class_wise_calibration_by_hand():
    """Two images in each of two bins, of equal width or of equally many; the last class has no images."""
    probabilities = np.array([[0.1, 0.8, 0.1], [0.3, 0.6, 0.1], [0.6, 0.3, 0.1], [0.8, 0.1, 0.1]])
    labels = np.array([1, 0, 0, 0])
    # class 0: bins (0.1 0.3 | 0.6 0.8), its images 0 1 | 1 1; class 1: bins (0.1 0.3 | 0.6 0.8), 0 0 | 0 1
    gaps = [abs(0.5 - 0.2), abs(1 - 0.7), abs(0 - 0.2), abs(0.5 - 0.7)]
    found = class_wise_calibration(np.log(probabilities), labels, num_bins=2)
    assert found == {
        "class_wise_calibration_error": pytest.approx(sum(gaps) / 4),
        "adaptive_calibration_error": pytest.approx(sum(gaps) / 4),
    }
    # with three bins, of equally many: 0.1 | 0.3 | 0.6 0.8; of equal width: 0.1 0.3 | 0.6 | 0.8
    found = class_wise_calibration(np.log(probabilities), labels, num_bins=3)
    by_mass = [(0.1 + 0.7 + 0.3) / 3, (0.1 + 0.3 + 0.2) / 3]
    by_width = [(2 * 0.3 + 0.4 + 0.2) / 4, (2 * 0.2 + 0.6 + 0.2) / 4]
    assert found["adaptive_calibration_error"] == pytest.approx(sum(by_mass) / 2)
    assert found["class_wise_calibration_error"] == pytest.approx(sum(by_width) / 2)


def test_probabilities_that_are_right_have_no_class_wise_calibration_error():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(3), size=50_000)
    labels = (generator.random(50_000)[:, None] > probabilities.cumsum(axis=1)).sum(axis=1)
    assert all(error < 0.01 for error in class_wise_calibration(np.log(probabilities), labels).values())
    overconfident = probabilities**3 / (probabilities**3).sum(axis=1, keepdims=True)
    assert all(error > 0.05 for error in class_wise_calibration(np.log(overconfident), labels).values())
    assert len(class_wise_calibration(np.log(probabilities[:4]), labels[:4])) == 2  # fewer images than bins


def test_the_table_names_the_worst_class():
    counts, names = [10, 300], ["rare", "common"]
    metrics = shot_accuracy([0, 1, 1, 1], [0, 0, 1, 1], counts)
    metrics |= class_summary(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1]), 2)
    lines = [line.split() for line in accuracy_table(metrics, counts, names).splitlines()]
    assert ["worst", "class,", "rare", "50.0", "%"] in lines
    assert ["macro", "F1", "73.3", "%"] in lines
