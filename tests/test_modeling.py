"""Properties of the network: what it computes, what depends on what, what it refuses."""

import copy

import pytest
import torch
from conftest import TINY_NETWORKS, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from configuration_ride_bf import RideBfConfig
from modeling_ride_bf import RideBfForImageClassification, RideBfModel
from ride_bf.methods.losses import RideLoss
from ride_bf.methods.objectives import ClassificationObjective, SharedClassifierObjective
from ride_bf.recipes.networks import RESNET10, RESNET32, RESNET50, RESNEXT50

RESNET101 = {**RESNET50, "depths": [3, 4, 23, 3]}
RESNET152 = {**RESNET50, "depths": [3, 8, 36, 3]}
MODES = ("none", "insert", "shared_classifier")
COUNTS = [50, 20, 10, 5, 2]


def objective_for(mode):
    criterion = RideLoss(COUNTS)
    return SharedClassifierObjective(criterion) if mode == "shared_classifier" else ClassificationObjective(criterion)


@pytest.mark.parametrize(
    ("network", "num_labels", "without", "with_batchformer"),
    [
        (RESNET32, 100, 783_856, 798_160),
        (RESNET10, 1000, 9_401_792, 10_290_368),
        (RESNET50, 1000, 43_677_248, 57_848_384),
        (RESNET50, 8142, 76_587_584, 90_758_720),
        (RESNEXT50, 1000, 42_889_024, 57_060_160),
        (RESNET101, 1000, 75_755_840, 89_926_976),
        (RESNET152, 365, 98_480_704, 112_651_840),
    ],
    ids=["resnet32", "resnet10", "resnet50", "resnet50-8142", "resnext50", "resnet101", "resnet152"],
)
def test_parameter_counts_are_those_of_the_authors_networks(network, num_labels, without, with_batchformer):
    for mode, expected in (("none", without), ("insert", with_batchformer), ("shared_classifier", with_batchformer)):
        with torch.device("meta"):
            model = RideBfForImageClassification(RideBfConfig(**network, num_labels=num_labels, batchformer=mode))
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize(
    ("network", "size", "num_labels", "giga_multiply_adds"),
    [
        (RESNET32, 32, 100, 0.100),
        (RESNET10, 224, 1000, 1.17),
        (RESNET50, 224, 1000, 5.77),
        (RESNEXT50, 224, 1000, 6.05),
    ],
    ids=["resnet32", "resnet10", "resnet50", "resnext50"],
)
def test_multiply_adds_are_those_of_the_authors_networks(network, size, num_labels, giga_multiply_adds):
    with torch.device("meta"):
        model = RideBfForImageClassification(RideBfConfig(**network, num_labels=num_labels)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, size, size))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_multiply_adds, abs=0.005)


@pytest.mark.parametrize("gate", [None, 0.5], ids=["post-norm", "gated"])
@pytest.mark.parametrize("classifier", ["linear", "cosine"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", TINY_NETWORKS)
def test_every_parameter_gets_a_gradient(network, mode, classifier, gate, images, labels):
    model = tiny_model(network, batchformer=mode, classifier=classifier, batchformer_layer_scale_init_value=gate)
    model.train()
    loss = objective_for(mode)(model(images), {"labels": labels}, reweight=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        assert parameter.grad.abs().sum() > 0, f"the gradient of {name} is zero"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", TINY_NETWORKS)
def test_output_shapes(network, mode, images):
    model = tiny_model(network, batchformer=mode, num_experts=2)
    features = model.config.feature_size
    for training in (True, False):
        outputs = model.train(training)(images)
        assert outputs.logits.shape == (6, 5)
        assert outputs.expert_logits.shape == (6, 2, 5)
        assert outputs.expert_features.shape == (6, 2, features)
        torch.testing.assert_close(outputs.logits, outputs.expert_logits.mean(dim=1))
        assert (outputs.batchformer_expert_logits is not None) == (training and mode == "shared_classifier")
        assert outputs.loss is outputs.router_logits is outputs.num_experts_used is outputs.hidden_states is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", TINY_NETWORKS)
def test_in_evaluation_a_prediction_does_not_depend_on_its_batch(network, mode, images):
    model = tiny_model(network, batchformer=mode).eval()
    with torch.no_grad():
        together = model(images).logits
        alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mode", "depends"), [("none", False), ("insert", True), ("shared_classifier", True)])
def test_in_training_the_batchformer_makes_images_depend_on_each_other(mode, depends, images):
    model = tiny_model(batchformer=mode).train()
    for module in model.modules():  # batch statistics would tie the images together as well
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = images.requires_grad_()
    outputs = model(images)
    stream = outputs.batchformer_expert_logits if mode == "shared_classifier" else outputs.expert_logits
    stream[0].sum().backward()
    assert bool(images.grad[1:].abs().sum() > 0) == depends
    if mode == "shared_classifier":
        images.grad = None
        model(images).expert_logits[0].sum().backward()
        assert images.grad[1:].abs().sum() == 0, "the raw stream must not mix images"


@pytest.mark.parametrize("gate", [None, 0.3])
def test_batchformer_commutes_with_permutations_of_the_batch_and_treats_experts_alike(gate):
    model = tiny_model(batchformer="insert", batchformer_num_layers=2, batchformer_layer_scale_init_value=gate)
    batchformer = model.batchformer.train()
    features = torch.randn(6, 3, 8)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(batchformer(features[order]), batchformer(features)[order])
    expert_by_expert = torch.stack([batchformer(features[:, [e]])[:, 0] for e in range(3)], dim=1)
    torch.testing.assert_close(batchformer(features), expert_by_expert)


def test_gated_layer_starts_as_the_identity():
    batchformer = tiny_model(batchformer="insert", batchformer_layer_scale_init_value=0.0).batchformer.train()
    features = torch.randn(6, 3, 8)
    assert torch.equal(batchformer(features), features)


def test_paper_layer_is_torchs_own():
    layer = tiny_model(batchformer="insert", batchformer_dropout=0.5).batchformer.layers[0]
    assert type(layer) is torch.nn.TransformerEncoderLayer
    assert not layer.norm_first
    assert layer.dropout.p == 0.5
    assert layer.linear1.out_features == 8  # a feed-forward as wide as the feature


def test_one_expert_without_shared_stages_is_a_plain_resnet(images):
    model = tiny_model(num_experts=1, num_shared_stages=0, classifier="linear").eval()
    outputs = model(images)
    torch.testing.assert_close(outputs.logits, model.classifiers[0](outputs.expert_features[:, 0]))


def test_deep_networks_share_what_they_are_told_to_share():
    for shared in range(3):
        model = tiny_model(depths=[1, 1, 1], hidden_sizes=[4, 6, 8], num_shared_stages=shared)
        assert len(model.ride_bf.trunk.stages) == shared
        assert all(len(expert.stages) == 3 - shared for expert in model.ride_bf.experts)


@pytest.mark.parametrize("network", TINY_NETWORKS)
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (33, 32), (64, 40)])
def test_any_image_size(network, size):
    model = tiny_model(network).eval()
    assert model(torch.randn(2, 3, *size)).logits.isfinite().all()


@pytest.mark.parametrize("network", TINY_NETWORKS)
def test_hidden_states_are_the_stem_then_every_stage(network, images):
    model = tiny_model(network, num_experts=2)
    hidden_states = model(images, output_hidden_states=True).hidden_states
    config = model.config
    stem_size = 24 if config.stem_type == "cifar" else 6
    assert hidden_states[0].shape == (6, config.hidden_sizes[0], stem_size, stem_size)
    assert hidden_states[1].shape == (6, config.hidden_sizes[0] * config.expansion, stem_size, stem_size)
    assert hidden_states[2].shape == (6, 2, config.feature_size, stem_size // 2, stem_size // 2)
    assert len(hidden_states) == 3
    outputs = model(images, output_hidden_states=True)
    torch.testing.assert_close(outputs.hidden_states[-1].mean(dim=(3, 4)), outputs.expert_features)


def test_base_model_gives_the_classifiers_features(images):
    classifier = tiny_model("bottleneck").eval()
    base = RideBfModel(classifier.config).eval()
    base.load_state_dict(classifier.ride_bf.state_dict())
    torch.testing.assert_close(base(images).expert_features, classifier(images).expert_features)
    assert len(base(images, output_hidden_states=True).hidden_states) == 3


def test_loss_is_the_cross_entropy_of_the_mean_logits(images, labels):
    model = tiny_model().eval()
    outputs = model(images, labels=labels)
    log_probabilities = outputs.logits.log_softmax(dim=1)
    by_hand = -sum(log_probabilities[i, label] for i, label in enumerate(labels.tolist())) / 6
    torch.testing.assert_close(outputs.loss, by_hand)


def test_return_tuple(images):
    model = tiny_model().eval()
    assert [value.shape for value in model(images, return_dict=False)] == [(6, 5), (6, 3, 5), (6, 3, 8)]
    loss, logits, *_ = model(images, labels=torch.zeros(6, dtype=torch.long), return_dict=False)
    assert loss.shape == ()
    assert logits.shape == (6, 5)


@pytest.mark.parametrize("base_class", [False, True])
@pytest.mark.parametrize(
    ("pixel_values", "error", "message"),
    [
        (torch.zeros(3, 24, 24), ValueError, r"\(batch, 3, height, width\).*got shape \(3, 24, 24\)"),
        (torch.zeros(2, 1, 24, 24), ValueError, r"got shape \(2, 1, 24, 24\)"),
        (torch.zeros(2, 24, 24, 3), ValueError, r"got shape \(2, 24, 24, 3\)"),
        (torch.zeros(0, 3, 24, 24), ValueError, r"got shape \(0, 3, 24, 24\)"),
        (torch.zeros(2, 3, 0, 24), ValueError, r"got shape \(2, 3, 0, 24\)"),
        (torch.zeros(2, 3, 24, 24, dtype=torch.uint8), TypeError, "got torch.uint8"),
        (torch.zeros(2, 3, 24, 24, dtype=torch.float64), TypeError, r"torch.float64.*pass pixel_values.to"),
        ([[1.0]], TypeError, "got list"),
    ],
)
def test_wrong_pixel_values_are_refused(base_class, pixel_values, error, message):
    model = tiny_model()
    with pytest.raises(error, match=message):
        (model.ride_bf if base_class else model)(pixel_values)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 4, 5]), r"0 to 4.*got \[5\]"),
        (torch.tensor([0, 1, 2, 3, 4, -1]), r"got \[-1\]"),
        (torch.tensor([0, 1]), r"shape \(6,\).*got torch.int64 of shape \(2,\)"),
        (torch.zeros(6), "got torch.float32"),
        ([0, 1, 2, 3, 4, 0], r"shape \(6,\), torch.int64; got list"),
    ],
)
def test_wrong_labels_are_refused(images, labels, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_model()(images, labels=labels)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(mode, images, labels):
    plain = tiny_model("bottleneck", batchformer=mode).train()
    checkpointed = copy.deepcopy(plain)
    newer = "activation_checkpointing_enable"  # its name since transformers 5.23
    getattr(checkpointed, newer if hasattr(checkpointed, newer) else "gradient_checkpointing_enable")()
    blocks = [module for module in checkpointed.modules() if getattr(module, "gradient_checkpointing", False)]
    assert len(blocks) == 2 + 3  # two shared, one of each expert's
    for model in (plain, checkpointed):
        objective_for(mode)(model(images), {"labels": labels}).backward()
    for (name, expected), actual in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=name)
    for (name, expected), actual in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("mode", MODES)
def test_autocast_step_is_finite(mode, images, labels):
    """bfloat16 is what a CPU autocasts to; tests/test_losses.py holds the losses to float16's range."""
    model = tiny_model("bottleneck", batchformer=mode).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images)
        loss = objective_for(mode)(outputs, {"labels": labels}, reweight=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cosine_classifier_is_the_angle_whatever_the_lengths(dtype):
    classifier = tiny_model().classifiers[0]
    features = torch.randn(6, 8) * torch.tensor([0.01, 0.1, 1, 10, 100, 1000])[:, None]
    with torch.no_grad():
        classifier.weight.mul_(torch.tensor([0.01, 0.1, 1, 10, 0])[:, None])
        logits = classifier.to(dtype)(features.to(dtype))
    expected = 30 * torch.cosine_similarity(features[:, None], classifier.weight.float()[None], dim=2)
    assert logits.dtype == dtype
    assert torch.equal(logits[:, 4], torch.zeros(6, dtype=dtype))  # a class without a direction
    rounding = {torch.float16: 0.03, torch.bfloat16: 0.3, torch.float32: 1e-4, torch.float64: 1e-4}[dtype]
    torch.testing.assert_close(logits.float(), expected, atol=rounding, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_feature_of_zeros_has_logits_of_zero_in_every_precision(dtype):
    model = tiny_model(router=True, router_top_k=3).to(dtype)
    zeros = torch.zeros(2, 8, dtype=dtype)
    assert torch.equal(model.classifiers[0](zeros), torch.zeros(2, 5, dtype=dtype))
    assert model.router(0, zeros, torch.zeros(2, 5, dtype=dtype)).isfinite().all()


def test_initialisation_follows_the_stem():
    torch.manual_seed(0)
    wide = {"depths": [1, 1], "hidden_sizes": [64, 256], "batchformer": "insert", "classifier": "linear"}
    imagenet, cifar = tiny_model("imagenet_basic", **wide), tiny_model("cifar", **wide)

    def convolution(model):
        return model.ride_bf.experts[0].stages[0][0].layers[0].convolution.weight  # 3x3, 64 -> 256

    assert convolution(imagenet).std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert convolution(cifar).std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    bound = 256**-0.5
    for linear in (imagenet.classifiers[0], imagenet.batchformer.layers[0].linear1):
        assert linear.weight.abs().max().item() <= bound
        assert linear.bias.abs().max().item() <= bound
    assert cifar.batchformer.layers[0].linear1.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    for model in (imagenet, cifar):
        attention = model.batchformer.layers[0].self_attn
        assert attention.in_proj_weight.abs().max().item() <= (6 / (256 + 768)) ** 0.5
        assert attention.in_proj_bias.abs().max() == attention.out_proj.bias.abs().max() == 0
    cosine = tiny_model(classifier="cosine").classifiers[0].weight
    torch.testing.assert_close(cosine.norm(dim=1), torch.ones(5))


class TestRouter:
    """Inference that stops early, against training, which runs every expert."""

    @pytest.fixture
    def model(self, images):
        model = tiny_model(router=True, router_top_k=3, router_hidden_size=4).eval()
        with torch.no_grad():  # a router that sends about half of the images on
            decisions = model._forward_all(images, output_hidden_states=None).router_logits
            model.router.output_layers[0].bias -= decisions.median()
        return model

    def test_outputs_agree_with_running_every_expert(self, model, images):
        images = torch.cat([images, -images, 3 * images])
        with torch.no_grad():
            routed = model(images)
            everything = model._forward_all(images, output_hidden_states=None)
        expected_used = 1 + (everything.router_logits > 0).long().cumprod(dim=1).sum(dim=1)
        assert torch.equal(routed.num_experts_used, expected_used)
        assert expected_used.unique().numel() > 1, "the images must not all be treated alike"
        for image, used in enumerate(expected_used.tolist()):
            expected = everything.expert_logits[image, :used]
            torch.testing.assert_close(routed.expert_logits[image, :used], expected)
            torch.testing.assert_close(routed.logits[image], expected.mean(dim=0))
            assert routed.expert_logits[image, used:].isnan().all()
            asked = min(used, 2)
            torch.testing.assert_close(
                routed.router_logits[image, :asked], everything.router_logits[image, :asked], rtol=1e-4, atol=1e-5
            )
            assert routed.router_logits[image, asked:].isnan().all()

    def test_an_expert_runs_only_on_the_images_that_need_it(self, model, images):
        seen = []
        for expert in model.ride_bf.experts:
            expert.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
        with torch.no_grad():
            used = model(images).num_experts_used
        assert seen == [int((used >= expert).sum()) for expert in (1, 2, 3)]
        assert sum(seen) < 3 * len(images)

    def test_hidden_states_of_experts_that_did_not_run_are_nan(self, model, images):
        with torch.no_grad():
            outputs = model(torch.cat([images, -images]), output_hidden_states=True)
        ran = ~outputs.expert_logits[:, :, 0].isnan()
        assert torch.equal(~outputs.hidden_states[-1].isnan().flatten(2).any(dim=2), ran)
        assert torch.equal(~outputs.expert_features.isnan().any(dim=2), ran)

    def test_training_runs_all_experts_and_reaches_the_router(self, model, images):
        model.train()
        outputs = model(images)
        assert outputs.num_experts_used.tolist() == [3] * 6
        assert outputs.router_logits.shape == (6, 2)
        outputs.router_logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.router.parameters())

    def test_threshold(self, model, images):
        shares = []
        for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
            model.config.router_threshold = threshold
            with torch.no_grad():
                outputs = model(images)
            shares.append(outputs.num_experts_used.sum().item())
            asked = outputs.router_logits.sigmoid()
            sent_on = ~outputs.expert_logits[:, 1:, 0].isnan()
            assert torch.equal(sent_on[:, 0], asked[:, 0] > threshold)
        assert shares == sorted(shares, reverse=True)
        assert (shares[0], shares[-1]) == (3 * len(images), len(images))

    def test_an_output_layer_for_each_router(self, images):
        model = tiny_model(router=True, router_top_k=3, router_shared_output=False).eval()
        assert len(model.router.output_layers) == 2
        assert model(images).router_logits.shape == (6, 2)
