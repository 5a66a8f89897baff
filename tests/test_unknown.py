"""None of the classes: AUROC and rates by hand, the share of known images that is rejected, and other images."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from test_calibrate import IMAGE
from test_evaluate import save_model

from confidence_ride_bf import KNOWN_SCORES, Confidence
from data import load_unlabelled
from data.notices import printed_notices
from ride_bf import calibrate, classify, evaluate
from ride_bf.evaluation.metrics import shot_groups
from ride_bf.evaluation.results import read_results
from ride_bf.evaluation.unknown import (
    auroc,
    choose_known_score,
    false_positive_rate,
    known_columns,
    known_threshold,
    measure_rejected,
    measure_unknown,
)
from ride_bf.runs.models import load_config

COUNTS = [200, 150, 60, 30, 10, 5]
GROUPS = shot_groups(COUNTS)


def test_scores_by_hand():
    logits = torch.tensor([[1.0, 3.0, 0.0]])
    exponentials = np.exp([1.0, 3.0, 0.0])
    found = {name: column.item() for name, column in known_columns(logits).items()}
    assert list(found) == list(KNOWN_SCORES)
    assert found["max_logit"] == 3
    assert found["energy"] == pytest.approx(np.log(exponentials.sum()))
    assert found["max_probability"] == pytest.approx(exponentials[1] / exponentials.sum())
    rejecting = {"reject_known": 0.05, "known_score": "max_logit"}
    assert Confidence(**rejecting, known_threshold=3.0).rejected(logits).tolist() == [False]
    assert Confidence(**rejecting, known_threshold=3.1).rejected(logits).tolist() == [True]
    with pytest.raises(ValueError, match=r"rejects no images: run python -m ride_bf\.calibrate MODEL --reject_known"):
        Confidence().rejected(logits)
    with pytest.raises(ValueError, match="no known_score is called 'odds'"):
        Confidence(reject_known=0.05, known_score="odds", known_threshold=1.0)
    with pytest.raises(ValueError, match="known_score and known_threshold belong together"):
        Confidence(reject_known=0.05)


def test_auroc_and_the_false_positive_rate_by_hand():
    known, unknown = np.array([3.0, 2.0, 1.0]), np.array([2.5, 2.0, 0.5, 0.0])
    # of 12 pairs the known image is above in 4 + 2 and 2 of them, and equal in one: 8.5
    assert auroc(known, unknown) == pytest.approx(8.5 / 12)
    assert false_positive_rate(known, unknown) == 2 / 4  # all known images are kept by 1 and more
    twenty = np.arange(1, 21) / 1.0
    assert false_positive_rate(twenty, np.array([1.0, 1.5, 2.0, 3.0])) == 2 / 4  # the lowest of 20 may be lost


def test_the_measurement_of_other_images_by_hand():
    known = {name: np.array([4.0, 3.0, 2.0, 1.0]) for name in KNOWN_SCORES}
    unknown = {name: np.array([2.5, 0.0]) for name in KNOWN_SCORES}
    labels = np.array([0, 1, 4, 5])
    found = measure_unknown(known, labels, unknown, np.array([0, 5]), COUNTS, "energy", 1.5)
    assert found["images"] == 2
    assert {group: one["auroc"] for group, one in found["scores"]["energy"].items()} == {
        "all": 6 / 8,
        "many": 1.0,
        "few": 0.5,
    }
    assert found["taken_for"] == {"many": 0.5, "medium": 0.0, "few": 0.5}
    assert (found["score"], found["rejected"]) == ("energy", 0.5)
    assert "rejected" not in measure_unknown(known, labels, unknown, np.array([0, 5]), COUNTS)
    shares = measure_rejected(np.array([False, False, True, False]), labels, COUNTS)
    assert shares == {"all": 0.25, "many": 0.0, "few": 0.5}


def scores_of(images_of_class, seed):
    """Scores that are lower for rare classes."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), images_of_class)
    return generator.normal(size=len(labels)) + np.linspace(3, 0, 6)[labels], labels


def test_no_group_is_rejected_more_often_than_promised_over_many_splits():
    splits, reject = 300, 0.1
    rejected = dict.fromkeys(GROUPS, 0)
    for split in range(splits):
        threshold, _ = known_threshold(*scores_of([10] * 6, split), GROUPS, reject)
        scores, labels = scores_of([20] * 6, 10_000 + split)
        for name, mask in GROUPS.items():  # one image of a group in each split: independent draws
            row = np.random.default_rng(split).choice(np.flatnonzero(mask[labels]))
            rejected[name] += bool(scores[row] < threshold)
    for count in rejected.values():
        assert binom.sf(count - 1, splits, reject) > 1e-3
    # the group with the lowest scores decides, and is rejected as often as promised, up to 1 / (n + 1)
    assert binom.cdf(rejected["few"], splits, reject - 1 / 21) > 1e-3
    # one threshold for the images of all groups together takes rare classes for unknown
    alone = {"all": np.ones(6, dtype=bool)}
    scores, labels = scores_of([1000] * 6, 0)
    below = scores < known_threshold(scores, labels, alone, reject)[0]
    assert below[labels >= 4].mean() > 2 * reject


def test_too_few_images_are_said_by_the_option():
    said = r"^--reject_known 0\.05 needs at least 19 calibration images, and there are 6: raise it to 0\.143, or"
    with pytest.raises(ValueError, match=said):
        known_threshold(*scores_of([1] * 6, 0), GROUPS, 0.05)
    assert len(known_threshold(*scores_of([1] * 6, 0), GROUPS, 0.143)[1]) == 1


def test_the_score_is_chosen_where_images_lose_their_own_logit():
    """The logits of each image have another level: only their differences tell, as the largest probability does."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(50)
    logits = 0.3 * torch.randn(300, 6, generator=generator)
    logits[torch.arange(300), labels] += 4
    name, found = choose_known_score(logits + 30 * torch.randn(300, 1, generator=generator), labels, GROUPS)
    assert name == "max_probability"
    assert set(found["energy"]) == {"many", "medium", "few"}
    assert min(found["max_probability"].values()) > 0.95 > 0.7 > max(found["max_logit"].values())
    assert choose_known_score(logits, labels, GROUPS)[0] == "max_logit"


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Noise in two folders, a broken image, a hidden one and a text."""
    folder = tmp_path_factory.mktemp("others")
    generator = np.random.default_rng(0)
    for index in range(12):
        place = folder / ("a" if index % 2 else "b/c") / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place)
    (folder / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "a" / ".hidden.png").write_bytes(b"")
    (folder / "note.txt").write_text("")
    return folder


def test_all_images_of_a_folder_are_read_and_others_counted(others, tmp_path):
    said = []
    with printed_notices(said.append):
        rows = load_unlabelled(others)
    assert len(rows) == 13
    assert any("no images are left out: note.txt" in line for line in said)
    with pytest.raises(ValueError, match=rf"^--unknown_dir {tmp_path} has no images; it has 0 other files"):
        load_unlabelled(tmp_path)
    with pytest.raises(ValueError, match=r"^--unknown_dir .*nothing is not a folder"):
        load_unlabelled(tmp_path / "nothing")


def test_from_a_model_to_the_report(others, tmp_path, capsys):
    folder = tmp_path / "model"
    save_model(folder)
    data = ["--dataset", "digits_lt"]
    calibrate.main([str(folder), *data, "--reject_known", "0.1"])
    assert "at most 10 % of the known images of a cell are rejected, by max_" in capsys.readouterr().out
    evaluate.main(["--model", str(folder), *data, "--unknown_dir", str(others)])
    found, printed = read_results(folder), capsys.readouterr().out
    assert found["unknown"]["images"] == 12
    assert found["unknown"]["broken_images_left_out"] == 1
    assert "12 unknown images: AUROC" in printed
    assert "1 more cannot be read" in printed
    assert found["unknown"]["score"] == found["confidence"]["rejected"]["score"]
    # 500 test images; of a group, 10 % are promised on average over the choice of 8 validation images a class
    assert 0 <= found["confidence"]["rejected"]["all"] < 0.2
    page = (folder / "report.html").read_text()
    assert 'id="unknown"' in page
    assert "none of the classes" in page
    config = load_config(folder)
    config.confidence = {**config.confidence, "known_threshold": 1e6}  # that no image reaches
    config.save_pretrained(folder)
    classify.main([str(folder), str(IMAGE)])
    assert ": none of the classes; the nearest: " in capsys.readouterr().out


def test_a_folder_of_which_no_image_can_be_read_is_named(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/1.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=rf"none of the 1 images of --unknown_dir {tmp_path}/odd can be read"):
        evaluate.main(
            ["--model", str(tmp_path / "model"), "--dataset", "digits_lt", "--unknown_dir", str(tmp_path / "odd")]
        )


def test_without_calibration_other_images_are_measured_too(others, tmp_path):
    folder = tmp_path / "model"
    save_model(folder)
    evaluate.main(["--model", str(folder), "--dataset", "digits_lt", "--unknown_dir", str(others)])
    found = read_results(folder)
    assert "confidence" not in found
    assert "rejected" not in found["unknown"]
    assert set(found["unknown"]["scores"]) == set(KNOWN_SCORES)
    with pytest.raises(SystemExit, match=r"--unknown_dir .*nothing is not a folder"):
        evaluate.main(["--model", str(folder), "--dataset", "digits_lt", "--unknown_dir", str(tmp_path / "nothing")])
