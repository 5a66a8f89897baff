"""The authors' checkpoints: every network, files that are wrong, files that are hostile, and the way back."""

import dataclasses
import hashlib
import json
import pickle
import re
import shutil
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from configuration_ride_bf import RideBfConfig
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.convert_reference import main
from ride_bf.recipes import RECIPES
from ride_bf.recipes.networks import RESNET10, RESNET32, RESNET50, RESNEXT50
from ride_bf.reference.checkpoints import _reference_key, convert, convert_key, to_reference
from ride_bf.reference.configurations import (
    ConversionError,
    read_reference_config,
    recipe_from_reference,
    reference_arch,
)

GOLDEN = ROOT / "tests" / "golden" / "authors_checkpoint"
RESNET101 = {**RESNET50, "depths": [3, 4, 23, 3]}
RESNET152 = {**RESNET50, "depths": [3, 8, 36, 3]}
RESNEXT152 = {**RESNEXT50, "depths": [3, 8, 36, 3]}
LINEAR = {"classifier": "linear"}

# Every kind of network that the authors' code builds: options of ours, and the arch of their config.json
NETWORKS = {
    "cifar": (RESNET32, "ResNet32Model", {"reduce_dimension": True, "use_norm": True, "num_experts": 3}),
    "cifar-linear-full-width": (
        {**RESNET32, **LINEAR, "hidden_sizes": [16, 32, 64], "num_experts": 2},
        "ResNet32Model",
        {"num_experts": 2},
    ),
    "cifar-one-expert": (
        {**RESNET32, **LINEAR, "hidden_sizes": [16, 32, 64], "num_experts": 1},
        "ResNet32Model",
        {"use_norm": False},
    ),
    "cifar-one-expert-cosine": (
        {**RESNET32, "hidden_sizes": [16, 32, 64], "num_experts": 1},
        "ResNet32Model",
        {"use_norm": True},
    ),
    "cifar-shared-classifier": (
        {**RESNET32, "batchformer": "shared_classifier"},
        "ResNet32Model",
        {"reduce_dimension": True, "use_norm": True, "num_experts": 3, "add_bt": 33},
    ),
    "resnet10-insert": (
        {**RESNET10, "batchformer": "insert"},
        "ResNet10Model",
        {"reduce_dimension": True, "use_norm": True, "num_experts": 3, "add_bt": 1},
    ),
    "resnet10-shared-third-stage": (
        {**RESNET10, "num_shared_stages": 3},
        "ResNet10Model",
        {"reduce_dimension": True, "use_norm": True, "num_experts": 3, "share_layer3": True},
    ),
    "resnet10-six-experts-eight-layers": (
        {**RESNET10, "num_experts": 6, "batchformer": "insert", "batchformer_num_layers": 8},
        "ResNet10Model",
        {"reduce_dimension": True, "use_norm": True, "num_experts": 6, "add_bt": 12},
    ),
    "resnet10-own-widths": (
        {**RESNET10, "hidden_sizes": [64, 128, 48, 96]},
        "ResNet10Model",
        {"layer3_output_dim": 48, "layer4_output_dim": 96, "use_norm": True, "num_experts": 3},
    ),
    "resnet50-one-expert-insert": (
        {**RESNET50, **LINEAR, "num_experts": 1, "hidden_sizes": [64, 128, 48, 96], "batchformer": "insert"},
        "ResNet50Model",
        {"layer3_output_dim": 48, "layer4_output_dim": 96, "add_bt": 33},  # insert, with one expert
    ),
    "resnext50-insert": (
        {**RESNEXT50, "hidden_sizes": [64, 128, 32, 64], "batchformer": "insert"},
        "ResNeXt50Model",
        {"layer3_output_dim": 32, "layer4_output_dim": 64, "use_norm": True, "num_experts": 3, "add_bt": 33},
    ),
    "cifar-router": (
        {**RESNET32, "router": True, "router_top_k": 5},
        "ResNet32EAModel",
        {"reduce_dimension": True, "use_norm": True, "num_experts": 3, "top_choices_num": 5},
    ),
    "resnet10-router-one-output-each-insert": (
        {
            **RESNET10,
            "router": True,
            "router_top_k": 7,
            "router_shared_output": False,
            "batchformer": "insert",
            "num_experts": 4,
        },
        "ResNet10EAModel",
        {
            "reduce_dimension": True,
            "use_norm": True,
            "num_experts": 4,
            "add_bt": 1,
            "share_expert_help_pred_fc": False,
            "top_choices_num": 7,
        },
    ),
}


@pytest.fixture(scope="module")
def image_batch():
    return torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def make_model(options, num_labels=12):
    torch.manual_seed(0)
    model = RideBfForImageClassification(RideBfConfig(**options, num_labels=num_labels)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def authors_state(model, prefix="backbone."):
    """The model's parameters as the authors' code names and lays them out."""
    config = model.config
    state = OrderedDict()
    for name, tensor in model.state_dict().items():
        if config.classifier == "cosine" and name.startswith("classifiers"):
            tensor = tensor.t()
        state[prefix + _reference_key(name, config)] = tensor.clone()
    return state


def write_checkpoint(folder, model, arch, arguments, prefix="backbone.", state=None, config=True):
    folder.mkdir(exist_ok=True, parents=True)
    state = authors_state(model, prefix) if state is None else state
    torch.save({"arch": arch, "epoch": 3, "state_dict": state, "monitor_best": 0.5}, folder / "model_best.pth")
    if config:
        entry = {"type": arch, "args": {"num_classes": model.config.num_labels, **arguments}}
        (folder / "config.json").write_text(json.dumps({"name": "run", "n_gpu": 1, "arch": entry}))
    return folder / "model_best.pth"


def compare(model, folder, images):
    converted = RideBfForImageClassification.from_pretrained(folder)
    differing = {"auto_map", "architectures", "dtype", "transformers_version", "_name_or_path"}
    expected, actual = model.config.to_dict(), converted.config.to_dict()
    for name in expected.keys() - differing:
        assert actual[name] == expected[name], name
    with torch.no_grad():
        before, after = model(images), converted(images)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after.expert_logits, before.expert_logits, rtol=1e-6, atol=1e-6, equal_nan=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name


def test_the_authors_own_checkpoint(tmp_path):
    """Logits that their code gave, to 1e-5 relative; and again after conversion back and forth."""
    expected = load_file(GOLDEN / "expected.safetensors")["eval_logits"]
    pixel_values = torch.sin(torch.arange(16 * 3 * 32 * 32, dtype=torch.float64) * 0.37).float().reshape(16, 3, 32, 32)
    convert(GOLDEN / "model_best.pth", tmp_path / "ours")
    to_reference(tmp_path / "ours", tmp_path / "theirs")
    convert(tmp_path / "theirs" / "model_best.pth", tmp_path / "again")
    for folder in ("ours", "again"):
        model = RideBfForImageClassification.from_pretrained(tmp_path / folder)
        assert model.config.batchformer == "shared_classifier"
        with torch.no_grad():
            logits = model(pixel_values).logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    original = torch.load(
        tmp_path / "theirs" / "model_best.pth", weights_only=True
    )  # plain values only: their loader needs no class of ours
    assert set(original) == {"arch", "epoch", "state_dict", "monitor_best", "config"}
    theirs = {key.removeprefix("backbone.") for key in original["state_dict"]}
    assert "layer2s.0.0.conv1.weight" in theirs
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["n_gpu"] == 1
    card = (tmp_path / "ours" / "README.md").read_text()
    assert hashlib.sha256((GOLDEN / "model_best.pth").read_bytes()).hexdigest() in card
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert processor.image_mean == pytest.approx([0.4914, 0.4822, 0.4465])


@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone."])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_with_its_config(name, prefix, tmp_path, image_batch):
    options, arch, arguments = NETWORKS[name]
    model = make_model(options)
    convert(write_checkpoint(tmp_path / "theirs", model, arch, arguments, prefix), tmp_path / "ours")
    compare(model, tmp_path / "ours", image_batch)


def test_a_file_of_an_old_torch(tmp_path, image_batch):
    options, arch, arguments = NETWORKS["cifar-shared-classifier"]
    model = make_model(options)
    path = write_checkpoint(tmp_path / "theirs", model, arch, arguments)
    content = {"state_dict": authors_state(model), "config": {"paths": tmp_path}}  # a pickled pathlib object
    torch.save(content, path, _use_new_zipfile_serialization=False)
    convert(path, tmp_path / "ours")
    compare(model, tmp_path / "ours", image_batch)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_without_its_config(name, tmp_path, image_batch):
    options, arch, arguments = NETWORKS[name]
    model = make_model(options)
    path = write_checkpoint(tmp_path / "theirs", model, arch, arguments, config=False)
    mode = options.get("batchformer")
    if mode is not None:
        with pytest.raises(ConversionError, match=r"--batchformer insert .* or --batchformer shared_classifier"):
            convert(path, tmp_path / "ours")
    convert(path, tmp_path / "ours", batchformer=mode)
    compare(model, tmp_path / "ours", image_batch)


@pytest.mark.filterwarnings("ignore:the authors' code has no data loader for 12 classes")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_back_and_forth(name, tmp_path, image_batch):
    model = make_model(NETWORKS[name][0])
    model.save_pretrained(tmp_path / "ours")
    to_reference(tmp_path / "ours", tmp_path / "theirs")
    convert(tmp_path / "theirs" / "model_best.pth", tmp_path / "again")
    compare(model, tmp_path / "again", image_batch)


# What the authors' config.json files of each data set say, and the recipe that they are here
LOADERS = {
    "imagenet_lt": (RESNET10, 1000, "ImageNetLTDataLoader", "data/ImageNet_LT", "imagenet_lt_resnet50"),
    "inaturalist18": (RESNET10, 8142, "iNaturalistDataLoader", "data/iNaturalist18", "inaturalist18_resnet50"),
    "cifar100_lt": (RESNET32, 100, "ImbalanceCIFAR100DataLoader", "data", "cifar100_lt_resnet32"),
    "cifar10_lt": (RESNET32, 10, "ImbalanceCIFAR10DataLoader", "data", "cifar10_lt_resnet32"),
}


def their_config(folder):
    """The config.json that their test.py finds beside the checkpoint."""
    to_reference(folder, folder.parent / "theirs")
    config = json.loads((folder.parent / "theirs/config.json").read_text())
    inside = torch.load(folder.parent / "theirs/model_best.pth", weights_only=True)["config"]
    assert inside == config
    return config


@pytest.mark.parametrize("dataset", LOADERS)
def test_a_network_trained_here_gets_the_configuration_of_its_data_set(dataset, tmp_path, recwarn):
    network, classes, loader, folder, recipe = LOADERS[dataset]
    make_model(network, classes).save_pretrained(tmp_path / "ours")
    config = their_config(tmp_path / "ours")
    assert (config["data_loader"]["type"], config["data_loader"]["args"]["data_dir"]) == (loader, folder)
    assert not [warning for warning in recwarn if "data loader" in str(warning.message)]
    told, published = recipe_from_reference(config), RECIPES[recipe]
    assert RECIPES[recipe].dataset == dataset
    own = {"name", "description", "network", "batchformer_window", "batchformer_loss_weight"}
    for field in {field.name for field in dataclasses.fields(published)} - own:
        assert getattr(told, field) == getattr(published, field), field


@pytest.mark.parametrize("classes", [9, 365])
def test_classes_for_which_the_authors_have_no_loader_are_warned_of(classes, tmp_path):
    make_model(RESNET32, classes).save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match=rf"no data loader for {classes} classes, only ImageNetLTDataLoader \(1,000\)"):
        their_config(tmp_path / "ours")


@pytest.mark.parametrize("place", [None, "elsewhere/ImageNet_LT"])
def test_what_a_configuration_of_theirs_says_stays_and_what_it_leaves_out_is_added(place, tmp_path):
    options, arch, arguments = NETWORKS["resnet10-insert"]
    path = write_checkpoint(tmp_path / "before", make_model(options, 1000), arch, arguments)
    config = json.loads((path.parent / "config.json").read_text()) | {"n_gpu": 4}
    if place is not None:
        config["data_loader"] = {"type": "ImageNetLTDataLoader", "args": {"data_dir": place, "batch_size": 7}}
    (path.parent / "config.json").write_text(json.dumps(config))
    convert(path, tmp_path / "ours")
    back = their_config(tmp_path / "ours")
    assert {name: back[name] for name in config} == config | {"n_gpu": 1}
    assert back["data_loader"]["args"]["data_dir"] == (place or "data/ImageNet_LT")
    assert {"loss", "metrics", "optimizer", "lr_scheduler", "trainer"} <= set(back), "what their test.py reads"


@pytest.mark.parametrize(
    ("network", "arch"),
    [
        (RESNET10, "ResNet10Model"),
        (RESNET50, "ResNet50Model"),
        (RESNEXT50, "ResNeXt50Model"),
        (RESNET101, "ResNet101Model"),
        (RESNET152, "ResNet152Model"),
        (RESNEXT152, "ResNeXt152Model"),
    ],
)
def test_names_of_the_large_networks(network, arch):
    """Too large to write in a test: their names, and every parameter's there and back."""
    config = RideBfConfig(**network, num_labels=1000, batchformer="insert")
    entry = reference_arch(config)
    assert entry["type"] == arch
    told = read_reference_config({"arch": entry})
    assert {key: value for key, value in told.items() if key in network} == {
        key: value for key, value in network.items() if key in told
    }
    with torch.device("meta"):
        names = list(RideBfForImageClassification(config).state_dict())
    assert [convert_key(_reference_key(name, config), config.num_shared_stages) for name in names] == names


@pytest.mark.parametrize(
    ("arch", "experts", "add_bt", "mode", "layers"),
    [
        ("ResNet32Model", 3, 0, "none", None),
        ("ResNet32Model", 3, 1, "insert", 1),
        ("ResNet32Model", 3, 12, "insert", 8),
        ("ResNet32Model", 3, 13, "insert", 6),
        ("ResNet32Model", 3, 22, "insert", 1),
        ("ResNet32Model", 3, 32, "shared_classifier", 1),
        ("ResNet50Model", 3, 33, "shared_classifier", 1),
        ("ResNet50Model", 1, 33, "insert", 1),
        ("ResNeXt50Model", 3, 32, "insert", 1),
        ("ResNeXt50Model", 3, 22, "insert", 1),
    ],
)
def test_every_add_bt(arch, experts, add_bt, mode, layers):
    told = read_reference_config(
        {"arch": {"type": arch, "args": {"num_classes": 10, "num_experts": experts, "add_bt": add_bt}}}
    )
    assert (told["batchformer"], told.get("batchformer_num_layers")) == (mode, layers)


def test_add_bt_that_names_no_network(tmp_path, image_batch):
    options, arch, arguments = NETWORKS["resnet10-insert"]
    model = make_model(options)
    path = write_checkpoint(tmp_path / "theirs", model, arch, {**arguments, "add_bt": 22})
    with pytest.raises(
        ConversionError, match=r"not its labels\. To read it as --batchformer insert, set add_bt to 1 in it"
    ):
        convert(path, tmp_path / "ours")
    convert(path, tmp_path / "ours", batchformer="insert")
    compare(model, tmp_path / "ours", image_batch)
    asked = {"arch": {"type": arch, "args": {**arguments, "num_classes": 12, "add_bt": 1}}}
    assert read_reference_config(asked)["batchformer"] == "insert", "the remedy, which a recipe file has too"


def test_a_batchformer_kept_in_evaluation_is_warned_of(tmp_path):
    options, arch, arguments = NETWORKS["resnet10-insert"]
    path = write_checkpoint(tmp_path / "theirs", make_model(options), arch, {**arguments, "eval_bt": 1})
    with pytest.warns(UserWarning, match="eval_bt"):
        convert(path, tmp_path / "ours")


class TestWrongFiles:
    @pytest.fixture
    def theirs(self, tmp_path):
        options, arch, arguments = NETWORKS["cifar"]
        model = make_model(options)
        return model, write_checkpoint(tmp_path / "theirs", model, arch, arguments)

    def refused(self, path, tmp_path, **arguments):
        with pytest.raises(ConversionError) as info:
            convert(path, tmp_path / "ours", **arguments)
        assert not (tmp_path / "ours").exists(), "nothing may be written"
        return str(info.value)

    @pytest.mark.parametrize(
        "key",
        ["layer2s.1.3.bn2.running_var", "conv1.weight", "linears.2.weight", "layer2s.0.0.conv1.weight", "bn1.bias"],
    )
    def test_a_renamed_key(self, theirs, tmp_path, key):
        model, path = theirs
        state = authors_state(model)
        state["backbone.some." + key] = state.pop("backbone." + key)
        write_checkpoint(path.parent, model, "ResNet32Model", {}, state=state, config=False)
        assert f"the authors' networks do not have these 1 names: some.{key}" in self.refused(path, tmp_path)

    def test_missing_parameters_are_listed(self, theirs, tmp_path):
        model, path = theirs
        state = authors_state(model)
        del state["backbone.layer1.4.conv2.weight"], state["backbone.bn1.bias"]
        write_checkpoint(path.parent, model, "ResNet32Model", {}, state=state, config=False)
        message = self.refused(path, tmp_path)
        assert "missing ride_bf.trunk.stages.0.4.layers.1.convolution.weight" in message
        assert "missing ride_bf.trunk.stem.0.bn.bias" in message

    def test_misshapen_parameters_are_listed(self, theirs, tmp_path):
        model, path = theirs
        state = authors_state(model)
        state["backbone.layer3s.2.4.bn1.weight"] = torch.ones(7)
        write_checkpoint(path.parent, model, "ResNet32Model", {}, state=state, config=False)
        message = self.refused(path, tmp_path)
        assert "ride_bf.experts.2.stages.1.4.layers.0.bn.weight is (7,), not (48,)" in message

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_classes": 100}, "num_labels: 100 there, 12 in the weights"),
            ({"num_experts": 4}, "num_experts: 4 there, 3 in the weights"),
            ({"use_norm": False}, "classifier: linear there, cosine in the weights"),
            ({"reduce_dimension": False}, r"hidden_sizes: \[16, 32, 64\] there, \[16, 24, 48\] in the weights"),
            ({"add_bt": 1}, "batchformer: insert there, no encoder in the weights"),
        ],
    )
    def test_a_wrong_config(self, theirs, tmp_path, changes, message):
        _, path = theirs
        config = json.loads((path.parent / "config.json").read_text())
        config["arch"]["args"] |= changes
        other = tmp_path / "other.json"
        other.write_text(json.dumps(config))
        assert re.search(message, self.refused(path, tmp_path, config_path=other))

    def test_the_config_of_another_network(self, theirs, tmp_path):
        _, path = theirs
        (path.parent / "config.json").write_text(json.dumps({"arch": {"type": "DenseNet", "args": {}}}))
        assert "names the network 'DenseNet'" in self.refused(path, tmp_path)
        (path.parent / "config.json").write_text("[]")
        assert "is no configuration of the authors' code" in self.refused(path, tmp_path)

    @pytest.mark.parametrize("length", [0, 10, 0.5, 0.99])
    def test_a_truncated_file(self, theirs, tmp_path, length):
        _, path = theirs
        content = path.read_bytes()
        path.write_bytes(content[: int(length * len(content)) if length < 1 else length])
        assert "is damaged, cut off or not a torch checkpoint" in self.refused(path, tmp_path)

    def test_a_flipped_byte(self, theirs, tmp_path):
        """torch reads on over a wrong checksum."""
        _, path = theirs
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        assert "the checksum of" in self.refused(path, tmp_path)

    def test_a_configuration_of_ours(self, theirs, tmp_path):
        model, path = theirs
        model.config.save_pretrained(tmp_path / "config")
        assert "it is of this library" in self.refused(path, tmp_path, config_path=tmp_path / "config" / "config.json")

    def test_not_a_checkpoint(self, theirs, tmp_path):
        _, path = theirs
        torch.save({"weights": torch.ones(3)}, path)
        assert "has no 'state_dict'" in self.refused(path, tmp_path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_hostile_pickle_is_refused_and_does_nothing(self, theirs, tmp_path, zipped):
        model, path = theirs

        class Hostile:
            def __reduce__(self):
                return (open, (str(tmp_path / "written"), "w"))

        content = {"state_dict": authors_state(model), "config": Hostile()}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        message = self.refused(path, tmp_path)
        assert re.search(r"asks for (_io|io|builtins)\.open, which no checkpoint of the authors contains", message)
        assert not (tmp_path / "written").exists()

    def test_a_plain_pickle_is_refused(self, theirs, tmp_path):
        _, path = theirs

        class Hostile:
            def __reduce__(self):
                return (open, (str(tmp_path / "written"), "w"))

        path.write_bytes(pickle.dumps(Hostile()))
        self.refused(path, tmp_path)
        assert not (tmp_path / "written").exists()

    def test_a_network_their_code_cannot_build(self, tmp_path):
        model = make_model({**RESNET32, "depths": [1, 1, 1]})
        model.save_pretrained(tmp_path / "ours")
        with pytest.raises(ConversionError, match=r"has no such network: .*depths \[1, 1, 1\]"):
            to_reference(tmp_path / "ours", tmp_path / "theirs")
        assert not (tmp_path / "theirs").exists()


def test_command(tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(GOLDEN, folder)
    main([str(folder / "model_best.pth"), "--output_dir", str(tmp_path / "ours")])
    main([str(tmp_path / "ours"), "--to_reference", "--output_dir", str(tmp_path / "back")])
    assert (tmp_path / "back" / "model_best.pth").is_file()
    (folder / "model_best.pth").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match=r"error: .*is damaged"):
        main([str(folder / "model_best.pth"), "--output_dir", str(tmp_path / "other")])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere.pth"), "--output_dir", str(tmp_path / "other")])
    assert "nowhere.pth does not exist" in capsys.readouterr().err
    for path, extra, message in (
        (folder, [], "is a folder; name the .pth file in it"),
        (folder / "model_best.pth", ["--to_reference"], "--to_reference takes the folder of a model"),
    ):
        with pytest.raises(SystemExit):
            main([str(path), *extra, "--output_dir", str(tmp_path / "other")])
        assert message in capsys.readouterr().err
