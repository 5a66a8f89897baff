import pytest

from ride_bf.metrics import expert_use, shot_accuracy, shot_groups
from ride_bf.report import accuracy_table, shot_summary


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
    metrics = shot_accuracy([0, 1, 1, 1], [0, 0, 1, 1], counts)
    lines = [line.split() for line in accuracy_table(metrics, counts, names).splitlines()]
    assert lines[1] == ["all", "2", "310", "75.0", "%"]
    assert lines[2] == ["many-shot", "1", "300", "100.0", "%"]
    assert lines[3] == ["few-shot", "1", "10", "50.0", "%"]
    assert lines[-2:] == [["class", "common", "300", "100.0", "%"], ["class", "rare", "10", "50.0", "%"]]
    assert shot_summary(metrics).split() == ["all", "75.0", "many", "100.0", "few", "50.0"]


def test_expert_use_by_hand():
    assert expert_use([1, 1, 3, 2], [0, 0, 0, 1], [200, 5], num_experts=3) == {
        "experts_used": [0.5, 0.25, 0.25],
        "many_shot_experts_used": pytest.approx([2 / 3, 0, 1 / 3]),
        "few_shot_experts_used": [0.0, 1.0, 0.0],
    }
