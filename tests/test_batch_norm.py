"""BatchNorm with the images of each process, or of all."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from processes import Command, torchrun
from safetensors.torch import load_file
from test_training import SMALL_ARGUMENTS, assert_same_weights, train
from torch import nn

from modeling_ride_bf import RideBfForImageClassification
from ride_bf.methods.trainer_loss import TrainerLoss
from ride_bf.recipes import RECIPES
from ride_bf.training.arguments import parse_arguments
from ride_bf.training.batch_norm import check_batch_norm, check_synchronised, synchronise_batch_norm
from ride_bf.training.freezing import set_train_mode
from ride_bf.training.running_statistics import RunningStatistics

RECIPE = RECIPES["digits_lt_resnet32"]
SYNCHRONISED = RECIPE.with_overrides(batchnorm="synchronised")


def norms(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_every_norm_that_trains_is_synchronised():
    model = tiny_model()
    frozen = model.ride_bf.trunk.stem[0].bn.requires_grad_(False)
    before, parameters = dict(model.state_dict()), list(model.parameters())
    number = len(norms(model, nn.BatchNorm2d))
    synchronise_batch_norm(model, SYNCHRONISED, num_processes=4)
    assert norms(model, nn.BatchNorm2d) == [frozen]
    assert len(norms(model, nn.SyncBatchNorm)) == number - 1 > 0
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True)), "the optimizer's"
    set_train_mode(model)
    assert not frozen.training
    assert len(RunningStatistics(Accelerator(cpu=True), model).buffers) == 2 * number, "checkpoints average them too"


@pytest.mark.parametrize(
    ("recipe", "processes"),
    [(RECIPE, 4), (SYNCHRONISED, 1), (SYNCHRONISED.with_overrides(backbone="somewhere", batchformer="none"), 4)],
)
def test_what_stays_local(recipe, processes):
    model = tiny_model()
    synchronise_batch_norm(model, recipe, processes)
    assert not norms(model, nn.SyncBatchNorm)


def test_the_saved_model_has_an_ordinary_norm(tmp_path, images):
    model = tiny_model()
    model.train()(images)
    synchronise_batch_norm(model, SYNCHRONISED, num_processes=2)
    model.save_pretrained(tmp_path)
    saved = RideBfForImageClassification.from_pretrained(tmp_path)
    assert not norms(saved, nn.SyncBatchNorm)
    assert norms(saved, nn.BatchNorm2d)
    torch.testing.assert_close(saved.eval()(images).logits, model.eval()(images).logits, rtol=0, atol=0)


def test_single_images_are_normalised_together():
    """Where a process holds one image and a feature map one pixel, BatchNorm needs the other processes' images."""
    recipe = SYNCHRONISED.with_overrides(batch_size=4, image_size=2)
    model = tiny_model()
    check_batch_norm(model, recipe, num_images=100, num_processes=4)
    with pytest.raises(ValueError, match="each batch of a process holds 1 image"):
        check_batch_norm(model, recipe.with_overrides(batchnorm="local"), num_images=100, num_processes=4)


def test_one_process_has_all_images(tmp_path):
    """On a CPU too: a run that was made for several GPUs is the same run."""
    local = train(tmp_path / "local", "--max_steps", 2)
    synchronised = train(tmp_path / "synchronised", "--max_steps", 2, "--batchnorm", "synchronised")
    assert_same_weights(local / "last", synchronised / "last")
    assert load_file(local / "last/model.safetensors").keys()


def test_cpus_cannot(tmp_path):
    command = ("train_accelerate.py", *SMALL_ARGUMENTS, "--output_dir", tmp_path / "out", "--batchnorm", "synchronised")
    code, printed = Command(*torchrun(2, *command), ACCELERATE_USE_CPU="true").finish()
    assert code != 0
    assert printed.count("error: --batchnorm synchronised needs GPUs") == 1, printed
    assert not (tmp_path / "out").exists()
    gpus = SimpleNamespace(num_processes=4, device=torch.device("cuda"))
    check_synchronised(SYNCHRONISED, gpus)


@pytest.mark.parametrize(
    "others",
    ["--backbone x", "--train_only classifiers --batchformer none --init_from x", "--freeze_batch_norm --init_from x"],
)
def test_an_option_that_cannot_act(others, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--batchnorm", "synchronised", *others.split()])
    assert "--batchnorm synchronised cannot act: it needs" in capsys.readouterr().err


def test_trainer_does_not_change_the_network():
    with pytest.raises(ValueError, match="batchnorm 'synchronised' changes the network, which Trainer does not"):
        TrainerLoss(SYNCHRONISED, [3, 2, 1])
