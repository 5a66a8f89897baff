"""What counts as an id on the Hub, and what of a model's place can only be a folder."""

import pytest

from data.custom import load_custom
from data.hub_ids import check_repo_id, is_hub_id
from ride_bf.runs.models import check_exists, find_model, load_model, load_processor
from ride_bf.training.backbone import from_place

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


@pytest.mark.parametrize("place", [place for place in NO_IDS if place not in ("", "/name", "../name")])
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


def test_a_name_in_a_folder_of_this_machine_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
    for check in (find_model, load_model, load_processor, lambda place: from_place(place, pytest.fail)):
        with pytest.raises(ValueError, match=r"^there is no folder outputs/min; did you mean outputs/mine\?$"):
            check("outputs/min")
    with pytest.raises(ValueError, match=r"^there is no folder outputs/xyz. If it is an id on the Hub, .* outputs$"):
        find_model("outputs/xyz")
    with pytest.raises(ValueError, match=rf"there is no folder {tmp_path}/outputs/othr; did you mean {tmp_path}/"):
        find_model(tmp_path / "outputs/othr")
    with pytest.raises(ValueError, match=r"there is no folder outputs/mine/bst"):
        find_model("outputs/mine/bst")
    with pytest.raises(ValueError, match=r"^there is no file or folder outputs/min; did you mean outputs/mine\?$"):
        load_custom("outputs/min")
    assert find_model("user/mine") == "user/mine"


def test_a_new_repository_needs_its_owner():
    with pytest.raises(ValueError, match="--space must be USER/NAME, not 'page': add the user or organization"):
        check_repo_id("page", "--space")
