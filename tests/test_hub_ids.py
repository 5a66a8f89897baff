"""What counts as an id on the Hub, and what of a model's place can only be a folder."""

import pytest

from data.hub_ids import check_repo_id, is_hub_id
from ride_bf.runs.models import check_exists

IDS = ("user/name", "gpt2", "user/name.v2", "user.name/resnet-50.a1", "resnet_1.0")
NO_IDS = ("", "/name", "./name.v2", "../name", "a/b/c", "user/", "user/na me", "user/a--b", "user/a..b", "user/x.git")


@pytest.mark.parametrize("place", IDS)
def test_ids(place):
    assert is_hub_id(place)
    check_exists(place)


@pytest.mark.parametrize("place", NO_IDS)
def test_no_ids(place):
    assert not is_hub_id(place)
    with pytest.raises(ValueError, match=r"--repo_id .* is not a USER/NAME that the Hub accepts"):
        check_repo_id(place, "--repo_id")


@pytest.mark.parametrize("place", [place for place in NO_IDS if place not in ("", "../name")])
def test_the_hub_is_not_asked_for_a_model_that_can_only_be_a_folder(place):
    with pytest.raises(ValueError, match=f"{place} does not exist, and it is not a valid Hub id"):
        check_exists(place)


def test_folders_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a--b/best").mkdir(parents=True)
    check_exists("runs/a--b/best")  # no id on the Hub, and there
    (tmp_path / "runs/model.safetensors").touch()
    with pytest.raises(ValueError, match=r"runs/model.safetensors is a file; name the folder of a saved model"):
        check_exists("runs/model.safetensors")


def test_a_new_repository_needs_its_owner():
    with pytest.raises(ValueError, match="--space must be USER/NAME, not 'page': add the user or organization"):
        check_repo_id("page", "--space")
