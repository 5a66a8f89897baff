"""The explain command: maps of each expert, and the nearest training images."""

import re

import pytest
import torch
from conftest import tiny_model
from test_backbones import BACKBONES, VIT, moved
from test_backbones import tiny_model as tiny_backbone_model
from test_evaluate import PROCESSOR, save_model
from transformers import AutoConfig, AutoModel

from backbone_ride_bf import FAMILIES, family_name
from configuration_ride_bf import RideBfConfig
from data import load_long_tailed
from modeling_ride_bf import RideBfForImageClassification
from ride_bf import embed, explain
from ride_bf.evaluation.explanation import page_paths
from ride_bf.evaluation.grad_cam import expert_maps
from ride_bf.runs.models import load_model


def one_image(side=32, seed=1):
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def randomise(module):
    """Shuffles the weights of each of its layers."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                parameter.flatten()[torch.randperm(parameter.numel(), generator=generator)].view_as(parameter)
            )


class TestMaps:
    def test_a_residual_network_has_the_map_of_its_definition(self):
        """The gradient of a linear classifier on a mean is its weights, so the map is CAM: Zhou et al., 2016."""
        model, image, label = tiny_model(classifier="linear").eval(), one_image(24), 3
        with torch.no_grad():
            last = model(image, output_hidden_states=True).hidden_states[-1][0]  # (E, c, h, w)
        for expert, found in enumerate(expert_maps(model, image, label)):
            weights = model.classifiers[expert].weight[label]
            expected = torch.einsum("c,chw->hw", weights.detach(), last[expert]).relu()
            expected = torch.nn.functional.interpolate(expected[None, None], (24, 24), mode="bilinear")[0, 0]
            assert expected.max() > 0
            torch.testing.assert_close(found, expected / expected.max())

    def test_a_transformer_has_the_map_of_its_definition(self):
        model, image, label = moved(tiny_backbone_model("vit", num_expert_layers=1)).eval(), one_image(), 2
        with torch.no_grad():
            trunk_states, context = model.ride_bf.trunk(image)
        tokens = trunk_states[-1].requires_grad_()  # (1, 17, c): a class token and 4 x 4 patches
        for expert, found in enumerate(expert_maps(model, image, label)):
            features, _ = model.ride_bf.experts[expert](tokens, **context)
            (gradient,) = torch.autograd.grad(model.classifiers[expert](features)[0, label], tokens)
            weights = gradient[0, 1:].mean(dim=0)  # (c,)
            expected = (tokens.detach()[0, 1:] @ weights).relu().view(1, 1, 4, 4)
            expected = torch.nn.functional.interpolate(expected, (32, 32), mode="bilinear")[0, 0]
            assert expected.max() > 0
            torch.testing.assert_close(found, expected / expected.max())

    @pytest.mark.parametrize("corner", [(slice(0, 8), slice(0, 8)), (slice(16, 24), slice(8, 16))])
    def test_what_is_empty_is_not_looked_at(self, corner):
        """Layers without bias hand on nothing where there is nothing, except beside it."""
        model, image = tiny_model(classifier="linear").eval(), torch.zeros(1, 3, 24, 24)
        image[0, :, *corner] = one_image(8)[0]
        near = torch.zeros(24, 24, dtype=torch.bool)
        near[tuple(slice(max(0, part.start - 12), part.stop + 12) for part in corner)] = True
        for label in range(5):
            for found in expert_maps(model, image, label):
                assert (found[~near] == 0).all()

    @pytest.mark.parametrize("own_blocks", [0, 1])
    @pytest.mark.parametrize("name", BACKBONES)
    def test_every_family_of_backbones_and_randomised_weights(self, name, own_blocks):
        """Adebayo et al.: Sanity Checks for Saliency Maps, 2018: a map that ignores the weights explains nothing."""
        model = moved(tiny_backbone_model(name, num_expert_layers=own_blocks)).eval()
        image = one_image(64)
        if name == "timm_vit":
            image = one_image(32)
        before = expert_maps(model, image, 1)
        assert len(before) == 2
        for found in before:
            assert found.shape == image.shape[2:]
            assert found.isfinite().all()
            assert 0 <= found.min() <= found.max() <= 1
        assert any(found.std() > 0.01 for found in before)
        for part in (model.classifiers, model):  # from the last layers to all of them
            randomise(part)
            after = expert_maps(model, image, 1)
            assert any((a - b).abs().mean() > 0.01 for a, b in zip(after, before, strict=True)), type(part)

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("regnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}),
            ("beit", {**VIT, "use_mean_pooling": True}),
        ],
    )
    def test_a_backbone_whose_blocks_are_not_known(self, kind, options):
        config = RideBfConfig(backbone_config=AutoConfig.for_model(kind, **options), num_labels=5, num_experts=2)
        assert family_name(AutoModel.from_config(config.backbone_config)) not in FAMILIES
        torch.manual_seed(0)
        model, image = moved(RideBfForImageClassification(config)).eval(), one_image()
        before = expert_maps(model, image, 1)
        assert any(found.std() > 0.01 for found in before)
        randomise(model)
        after = expert_maps(model, image, 1)
        assert any((a - b).abs().mean() > 0.01 for a, b in zip(after, before, strict=True))

    def test_a_backbone_of_which_only_the_class_token_is_seen(self):
        backbone = AutoConfig.for_model("beit", **VIT, use_mean_pooling=False)
        model = RideBfForImageClassification(RideBfConfig(backbone_config=backbone, num_labels=5)).eval()
        with pytest.raises(ValueError, match="no map for beit: after its last block only the class token counts"):
            expert_maps(model, one_image(), 0)

    def test_experts_and_classes_have_maps_of_their_own(self):
        model, image = tiny_model(classifier="cosine").eval(), one_image(24)
        maps = torch.stack([torch.stack(expert_maps(model, image, label)) for label in (0, 1)])  # (2, E, h, w)
        assert (maps[0] - maps[1]).abs().amax(dim=(1, 2)).min() > 0.01
        assert (maps[0, 0] - maps[0, 1]).abs().max() > 0.01

    def test_an_image_that_is_not_square(self):
        model = moved(tiny_backbone_model("vit")).eval()
        image = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
        assert expert_maps(model, image, 0)[0].shape == (32, 64)

    def test_nothing_remains_in_the_model(self):
        model, image = tiny_model().eval(), one_image(24)
        expert_maps(model, image, 0)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())

    @pytest.mark.parametrize("threshold", [0.0, 1.0])
    def test_an_expert_that_the_router_left_out(self, threshold):
        model = tiny_model(router=True, router_top_k=4, router_threshold=threshold).eval()
        maps = expert_maps(model, one_image(24), 0)
        with torch.no_grad():
            ran = model(one_image(24)).expert_logits[0, :, 0].isfinite().tolist()
        assert [found is not None for found in maps] == ran
        assert sum(ran) in (1, 3)


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """A model of digits with its embeddings, a digit of the training images as a file, and what `explain` wrote."""
    folder = tmp_path_factory.mktemp("explain") / "saved"
    save_model(folder)
    embed.main([str(folder), "--dataset", "digits_lt"])
    train = load_long_tailed("digits_lt")["train"]
    image = folder.parent / "seven <b>.png"
    train[300]["image"].save(image)
    explain.main([str(folder), str(image), "--dataset", "digits_lt", "--output_dir", str(folder.parent / "pages")])
    return folder, image, train[300]["label"], (folder.parent / "pages" / "seven <b>.html").read_text()


class TestCommand:
    def test_a_training_image_is_its_own_nearest(self, explained):
        _, _, label, page = explained
        assert page.count("Map of expert") == 3
        assert "seven &lt;b&gt;.png" in page
        neighbours = re.findall(r"<b>(\d)</b> · ([\d.]+)\s*<span>row (\d+)", page)
        assert neighbours[0] == (str(label), "0.000", "300")
        distances = [float(distance) for _, distance, _ in neighbours]
        assert len(neighbours) == 5
        assert distances == sorted(distances)

    def test_without_embeddings_and_for_another_class(self, explained, tmp_path, capsys):
        folder, image, _, _ = explained
        (folder / "embeddings.parquet").rename(tmp_path / "moved.parquet")
        try:
            explain.main([str(folder), str(image), "--class_name", "9", "--output_dir", str(tmp_path)])
            assert "without the nearest training images" in capsys.readouterr().out
            page = (tmp_path / f"{image.stem}.html").read_text()
            assert "speak for <b>9</b>" in page
            assert "nearest training images" not in page
            with pytest.raises(SystemExit, match=r"embeddings.parquet does not exist; python -m ride_bf.embed"):
                explain.main([str(folder), str(image), "--dataset", "digits_lt"])
        finally:
            (tmp_path / "moved.parquet").rename(folder / "embeddings.parquet")

    def test_data_that_cannot_be_loaded_cost_the_neighbours_only(self, explained, tmp_path, capsys):
        folder, image, _, _ = explained
        explain.main([str(folder), str(image), "--output_dir", str(tmp_path)])
        assert "without the nearest training images: " in (printed := capsys.readouterr().out)
        assert "does not say what it was trained on: name the data set with --dataset" in printed
        assert "Map of expert 2" in (tmp_path / f"{image.stem}.html").read_text()
        with pytest.raises(SystemExit, match="does not say what it was trained on"):
            explain.main([str(folder), str(image), "--embeddings", str(folder / "embeddings.parquet")])

    def test_errors_have_one_line(self, explained, tmp_path, capsys):
        folder, image, _, _ = explained
        with pytest.raises(SystemExit, match="the model has no class 'cat'; it has 0, 1"):
            explain.main([str(folder), str(image), "--class_name", "cat"])
        with pytest.raises(SystemExit, match=r"none.parquet does not exist; python -m ride_bf.embed"):
            explain.main(
                [str(folder), str(image), "--embeddings", str(tmp_path / "none.parquet"), "--dataset", "digits_lt"]
            )
        (tmp_path / "broken.png").write_bytes(b"no image")
        words = [str(folder), str(tmp_path / "broken.png"), str(image), "--dataset", "digits_lt"]
        with pytest.raises(SystemExit, match="1"):
            explain.main([*words, "--output_dir", str(tmp_path)])
        assert "broken.png cannot be read" in capsys.readouterr().err
        assert (tmp_path / f"{image.stem}.html").is_file()

    def test_a_calibrated_model(self, explained, tmp_path):
        folder, image, _, _ = explained
        model = load_model(folder)
        known = {"known_score": "max_logit", "known_threshold": 1e6, "reject_known": 0.05}
        model.config.confidence = {"temperature": 1e6, **known}
        model.save_pretrained(tmp_path / "saved")
        PROCESSOR.save_pretrained(tmp_path / "saved")
        explain.main([f"{tmp_path}/saved", str(image), "--output_dir", str(tmp_path)])
        page = (tmp_path / f"{image.stem}.html").read_text()
        assert page.count("10.0 %</span>") == 3  # one of ten classes, at this temperature
        assert "takes this image for none of its classes" in page

    def test_embeddings_of_another_model_are_refused(self, explained, tmp_path):
        folder, image, _, _ = explained
        save_model(tmp_path / "other", num_experts=2)
        words = ["--dataset", "digits_lt", "--embeddings", str(folder / "embeddings.parquet")]
        with pytest.raises(SystemExit, match=rf"has the features of another model; .* into {tmp_path}/other/emb"):
            explain.main([str(tmp_path / "other"), str(image), *words])


def test_pages_of_images_with_one_name(tmp_path):
    images = [tmp_path / "a/1.png", tmp_path / "b/1.png", tmp_path / "a/1.png", tmp_path / "2.jpg"]
    assert [page.name for page in page_paths(images, tmp_path).values()] == ["1.html", "1_2.html", "2.html"]
