"""Losses against arithmetic written out by hand, and in the ranges that half precision brings."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from modeling_ride_bf import RideBfOutput
from ride_bf.methods.losses import (
    BalancedSoftmaxLoss,
    CollaborativeLoss,
    CrossEntropyLoss,
    ExpertLogitAdjustedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    ReweightedCrossEntropyLoss,
    RideLoss,
    SadeLoss,
    diversity_temperatures,
    effective_number_weights,
    ldam_margins,
    loss_names,
    options_read,
    reversed_shares,
)
from ride_bf.methods.objectives import (
    ClassificationObjective,
    SharedClassifierObjective,
    make_criterion,
    make_objective,
)
from ride_bf.recipes import RECIPES
from ride_bf.recipes.digits_lt import DIGITS_LT_RESNET32

COUNTS = [81, 16, 1]
LOGITS = torch.tensor([[[2.0, 1.0, 0.0], [0.5, 1.5, -1.0]], [[0.0, 3.0, 1.0], [1.0, 1.0, 1.0]]])  # (2, 2, 3)
LABELS = torch.tensor([0, 2])
THREE_EXPERTS = torch.cat([LOGITS, LOGITS.flip(0)[:, :1]], dim=1)  # (2, 3, 3)
ALL_LOSSES = [
    RideLoss(COUNTS),
    LDAMLoss(COUNTS),
    FocalLoss(gamma=2.0),
    CrossEntropyLoss(),
    CrossEntropyLoss(effective_number_weights(COUNTS)),
    CollaborativeLoss(COUNTS),
    LogitAdjustedLoss(COUNTS),
    ExpertLogitAdjustedLoss(COUNTS, 0.5),
    ReweightedCrossEntropyLoss(COUNTS, beta=0.99),
    BalancedSoftmaxLoss(COUNTS),
    SadeLoss(COUNTS),
]


def cross_entropy(logits, label):
    return math.log(sum(math.exp(value) for value in logits)) - logits[label]


def softmax(logits):
    total = sum(math.exp(value) for value in logits)
    return [math.exp(value) / total for value in logits]


def test_margins():
    # 81^(-1/4) = 1/3, 16^(-1/4) = 1/2, 1^(-1/4) = 1, scaled to a largest of 0.5
    assert ldam_margins(COUNTS).tolist() == pytest.approx([1 / 6, 1 / 4, 1 / 2])


def test_weights():
    raw = [0.0001 / (1 - 0.9999**count) for count in COUNTS]
    expected = [3 * weight / sum(raw) for weight in raw]
    assert effective_number_weights(COUNTS).tolist() == pytest.approx(expected, rel=1e-6)


def test_diversity_temperatures():
    raw = [3 * count / 98 * 0.05 + 0.95 for count in COUNTS]
    assert diversity_temperatures(COUNTS, 0.05).tolist() == pytest.approx([value / raw[0] for value in raw])


def test_cross_entropy_is_of_the_mean_logits():
    mean = [[1.25, 1.25, -0.5], [0.5, 2.0, 1.0]]
    expected = [cross_entropy(mean[0], 0), cross_entropy(mean[1], 2)]
    assert CrossEntropyLoss()(LOGITS, LABELS).item() == pytest.approx(sum(expected) / 2)
    weights = effective_number_weights(COUNTS)
    w0, w2 = weights[0].item(), weights[2].item()
    weighted = (w0 * expected[0] + w2 * expected[1]) / (w0 + w2)
    for reweight in (False, True):  # re-weighted from the first epoch on
        assert CrossEntropyLoss(weights)(LOGITS, LABELS, reweight=reweight).item() == pytest.approx(weighted)


def test_focal():
    expected = 0.0
    for logits, label in (([1.25, 1.25, -0.5], 0), ([0.5, 2.0, 1.0], 2)):
        loss = cross_entropy(logits, label)
        expected += (1 - math.exp(-loss)) ** 2 * loss / 2
    assert FocalLoss(gamma=2.0)(LOGITS, LABELS).item() == pytest.approx(expected)


def test_ldam():
    lowered = [[1.25 - 30 / 6, 1.25, -0.5], [0.5, 2.0, 1.0 - 15.0]]
    losses = [cross_entropy(lowered[0], 0), cross_entropy(lowered[1], 2)]
    assert LDAMLoss(COUNTS)(LOGITS, LABELS).item() == pytest.approx(sum(losses) / 2)
    weights = effective_number_weights(COUNTS).tolist()
    weighted = (weights[0] * losses[0] + weights[2] * losses[1]) / (weights[0] + weights[2])
    assert LDAMLoss(COUNTS)(LOGITS, LABELS, reweight=True).item() == pytest.approx(weighted)


def test_balanced_softmax_and_logit_adjustment():
    """Balanced softmax as Ren et al. write it: the softmax weighted with the class counts."""
    mean = [[1.25, 1.25, -0.5], [0.5, 2.0, 1.0]]
    for tau in (1.0, 0.5):
        expected = 0.0
        for logits, label in zip(mean, LABELS.tolist(), strict=True):
            weighted = [count**tau * math.exp(value) for count, value in zip(COUNTS, logits, strict=True)]
            expected -= math.log(weighted[label] / sum(weighted)) / 2
        assert LogitAdjustedLoss(COUNTS, tau)(LOGITS, LABELS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reweight", [False, True])
def test_collaborative(reweight):
    expected = 2 * LDAMLoss(COUNTS)(LOGITS, LABELS, reweight=reweight)
    torch.testing.assert_close(CollaborativeLoss(COUNTS)(LOGITS, LABELS, reweight=reweight), expected)


@pytest.mark.parametrize("reweight", [False, True])
def test_ride(reweight):
    factor, base_temperature = -0.45, 1.5
    criterion = RideLoss(COUNTS, diversity_factor=factor, diversity_temperature=base_temperature)
    weights = effective_number_weights(COUNTS).tolist() if reweight else [1.0, 1.0, 1.0]
    shares = diversity_temperatures(COUNTS, 0.05).tolist() if reweight else [1.0, 1.0, 1.0]
    temperatures = [base_temperature * share for share in shares]
    mean_temperature = sum(temperatures) / 3
    margins = [5.0, 7.5, 15.0]
    expected = 0.0
    for expert in range(2):
        numerator = denominator = divergence = 0.0
        for image, label in enumerate(LABELS.tolist()):
            logits = LOGITS[image, expert].tolist()
            lowered = [value - margins[c] * (c == label) for c, value in enumerate(logits)]
            numerator += weights[label] * cross_entropy(lowered, label)
            denominator += weights[label]
            mean = LOGITS[image].mean(dim=0).tolist()
            target = softmax([value / t for value, t in zip(mean, temperatures, strict=True)])
            own = softmax([value / t for value, t in zip(logits, temperatures, strict=True)])
            divergence += sum(p * math.log(p / q) for p, q in zip(target, own, strict=True)) / 2
        expected += numerator / denominator + factor * mean_temperature**2 * divergence
    assert criterion(LOGITS, LABELS, reweight=reweight).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("criterion", ALL_LOSSES, ids=lambda criterion: type(criterion).__name__)
@pytest.mark.parametrize("reweight", [False, True])
def test_half_precision_under_autocast(criterion, reweight):
    """float16 logits of cosine classifiers, 30 x 3 experts apart, in batches whose sums leave float16's range."""
    torch.manual_seed(0)
    logits = (torch.rand(512, 3, 3) * 180 - 90).half().requires_grad_()
    labels = torch.randint(0, 3, (512,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(logits, labels, reweight=reweight)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(loss, criterion(logits.float(), labels, reweight=reweight))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_gradient_is_finite_for_a_certain_prediction(gamma):
    logits = torch.tensor([[[90.0, -90.0, -90.0]]]).requires_grad_()
    FocalLoss(gamma)(logits, torch.tensor([0])).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("criterion", ALL_LOSSES, ids=lambda criterion: type(criterion).__name__)
def test_losses_move_with_their_module_and_leave_no_state(criterion):
    assert not criterion.state_dict(), "a loss is made from the class counts; a checkpoint holds none of it"
    moved = copy.deepcopy(criterion).to("meta")
    assert all(buffer.device.type == "meta" for buffer in moved.buffers())


@pytest.mark.parametrize("make", [ldam_margins, effective_number_weights, RideLoss, LDAMLoss])
def test_class_without_images_is_named(make):
    with pytest.raises(ValueError, match=r"classes without images: \[1, 3\].*training split"):
        make([5, 0, 2, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RideLoss(COUNTS, diversity_temperature=0), "diversity_temperature must be positive"),
        (lambda: FocalLoss(gamma=-1), "gamma must not be negative"),
        (lambda: ldam_margins([]), "one number for each class"),
    ],
)
def test_impossible_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shared_classifier_objective_weighs_the_batchformer_stream():
    criterion = RideLoss(COUNTS)
    batch, other = {"labels": LABELS}, LOGITS.flip(0)
    outputs = RideBfOutput(expert_logits=LOGITS, batchformer_expert_logits=other)
    raw, batchformer = criterion(LOGITS, LABELS, reweight=True), criterion(other, LABELS, reweight=True)
    for weight in (0.0, 0.1, 1.0):
        loss = SharedClassifierObjective(criterion, batchformer_loss_weight=weight)(outputs, batch, reweight=True)
        torch.testing.assert_close(loss, raw + weight * batchformer)
    torch.testing.assert_close(ClassificationObjective(criterion)(outputs, batch, reweight=True), raw)


def test_shared_classifier_objective_needs_the_stream():
    with pytest.raises(ValueError, match="batchformer='shared_classifier' in train mode"):
        SharedClassifierObjective(RideLoss(COUNTS))(RideBfOutput(expert_logits=LOGITS), {"labels": LABELS})


def test_the_recipe_chooses_criterion_and_objective():
    kinds = {
        "ride": RideLoss,
        "ldam": LDAMLoss,
        "focal": FocalLoss,
        "cross_entropy": CrossEntropyLoss,
        "reweighted_cross_entropy": ReweightedCrossEntropyLoss,
        "balanced_softmax": BalancedSoftmaxLoss,
        "logit_adjusted": LogitAdjustedLoss,
        "expert_logit_adjusted": ExpertLogitAdjustedLoss,
        "collaborative": CollaborativeLoss,
        "sade": SadeLoss,
    }
    assert set(kinds) == set(loss_names())
    for loss, kind in kinds.items():
        criterion = make_criterion(DIGITS_LT_RESNET32.with_overrides(loss=loss), COUNTS)
        assert type(criterion) is kind
        weighted = getattr(criterion, "class_weights", None) is not None
        assert weighted == (loss in ("ride", "ldam", "collaborative", "reweighted_cross_entropy"))
    for recipe in RECIPES.values():
        shared = recipe.network["batchformer"] == "shared_classifier"
        assert isinstance(make_objective(recipe, COUNTS), SharedClassifierObjective) == shared


def test_a_loss_is_made_with_what_it_reads_of_the_recipe():
    recipe = DIGITS_LT_RESNET32.with_overrides(
        max_margin=0.25, cosine_scale=20.0, diversity_factor=-0.3, reweight_factor=0.5, label_smoothing=0.1
    )
    made, expected = make_criterion(recipe, COUNTS), RideLoss(COUNTS, -0.3, 1.0, 0.25, 20.0, 0.5, 0.1)
    torch.testing.assert_close(made(LOGITS, LABELS, reweight=True), expected(LOGITS, LABELS, reweight=True))
    made = make_criterion(replace(recipe, loss="reweighted_cross_entropy", class_weight_beta=0.9), COUNTS)
    expected = CrossEntropyLoss(effective_number_weights(COUNTS, 0.9), 0.1)
    torch.testing.assert_close(made(LOGITS, LABELS), expected(LOGITS, LABELS))
    recipe = replace(recipe, label_smoothing=0.0, logit_adjustment_tau=0.5, focal_gamma=3.0)
    for loss, expected in (
        ("logit_adjusted", LogitAdjustedLoss(COUNTS, 0.5)),
        ("balanced_softmax", LogitAdjustedLoss(COUNTS, 1.0)),
        ("focal", FocalLoss(3.0)),
    ):
        made = make_criterion(replace(recipe, loss=loss), COUNTS)
        torch.testing.assert_close(made(LOGITS, LABELS), expected(LOGITS, LABELS))


@pytest.mark.parametrize("name", loss_names())
def test_a_loss_says_whether_it_is_reweighted(name):
    """By its values: re-weighting changes those that say so, and no other."""
    criterion = make_criterion(DIGITS_LT_RESNET32.with_overrides(loss=name), COUNTS)
    plain, reweighted = (criterion(THREE_EXPERTS, LABELS, reweight=reweight) for reweight in (False, True))
    assert torch.equal(plain, reweighted) != criterion.reweights


@pytest.mark.parametrize("name", loss_names())
def test_a_loss_reads_the_options_that_it_names_and_no_other(name):
    """By its values: each option of a recipe changes those losses that say they read it."""
    others = {"diversity_factor": -0.7, "reweight_factor": 0.9, "max_margin": 0.1, "cosine_scale": 9.0}
    others |= {"focal_gamma": 3.0, "class_weight_beta": 0.5, "logit_adjustment_tau": 0.3}
    losses = {
        option: make_criterion(DIGITS_LT_RESNET32.with_overrides(loss=name, **{option: value}), COUNTS)(
            THREE_EXPERTS, LABELS, reweight=True
        )
        for option, value in {"epochs": 3, **others}.items()
    }
    changed = {option for option, loss in losses.items() if not torch.equal(loss, losses["epochs"])}
    read = {"cosine_scale" if option == "margin_scale" else option for option in options_read(name)}
    assert changed == read - {"label_smoothing", "reweight_epoch"}


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must be \(batch, experts, 3\), got \(2, 2, 5\)"):
        RideLoss(COUNTS)(torch.zeros(2, 2, 5), LABELS)
    with pytest.raises(ValueError, match=r"must be \(batch, experts, classes\), got \(2, 3\)"):
        CrossEntropyLoss()(torch.zeros(2, 3), LABELS)


class TestExpertLogitAdjusted:
    def test_each_expert_has_a_tau_of_its_own(self):
        taus = (0.0, 1.0, 2.0)[: LOGITS.shape[1]]
        expected = sum(LogitAdjustedLoss(COUNTS, tau)(LOGITS[:, [expert]], LABELS) for expert, tau in enumerate(taus))
        torch.testing.assert_close(ExpertLogitAdjustedLoss(COUNTS, taus)(LOGITS, LABELS), expected)

    def test_one_tau_is_that_of_all(self):
        all_the_same = ExpertLogitAdjustedLoss(COUNTS, [0.5] * LOGITS.shape[1])(LOGITS, LABELS)
        torch.testing.assert_close(ExpertLogitAdjustedLoss(COUNTS, 0.5)(LOGITS, LABELS), all_the_same)

    def test_another_number_of_experts(self):
        with pytest.raises(ValueError, match=r"has 2 numbers for \d experts; give one for all or one each"):
            ExpertLogitAdjustedLoss(COUNTS, [0.0, 1.0])(LOGITS.repeat(1, 3, 1), LABELS)

    def test_the_recipe_checks_the_number(self):
        per_expert = {"loss": "expert_logit_adjusted", "reweight_epoch": None}
        recipe = DIGITS_LT_RESNET32.with_overrides(**per_expert, logit_adjustment_tau=(0.0, 1.0, 2.0))
        again = type(recipe).from_json(json.loads(recipe.as_json()))
        assert again.logit_adjustment_tau == (0.0, 1.0, 2.0)
        assert DIGITS_LT_RESNET32.with_overrides(**per_expert, logit_adjustment_tau=(1.0,)).logit_adjustment_tau == 1
        with pytest.raises(ValueError, match=r"0\.0 1\.0 has 2 numbers for 3 experts"):
            recipe.with_overrides(logit_adjustment_tau=(0.0, 1.0))
        with pytest.raises(ValueError, match="set --loss expert_logit_adjusted"):
            recipe.with_overrides(loss="logit_adjusted")


class TestSade:
    def test_by_hand(self):
        """The shares are 81, 16 and 1 of 98, and 1, 16 and 81 of 98 in reverse order."""
        adjustments = [
            [0.0, 0.0, 0.0],
            [math.log(81 / 98), math.log(16 / 98), math.log(1 / 98)],
            [math.log(81 / 98) - 2 * math.log(1 / 98), -math.log(16 / 98), math.log(1 / 98) - 2 * math.log(81 / 98)],
        ]
        expected = 0.0
        for image, label in enumerate(LABELS.tolist()):
            for expert, added in enumerate(adjustments):
                logits = [one + other for one, other in zip(THREE_EXPERTS[image, expert].tolist(), added, strict=True)]
                expected += cross_entropy(logits, label) / 2
        assert SadeLoss(COUNTS)(THREE_EXPERTS, LABELS).item() == pytest.approx(expected, rel=1e-6)

    def test_the_shares_are_reversed_whatever_their_order(self):
        assert reversed_shares([2, 5, 1]).tolist() == [2 / 8, 1 / 8, 5 / 8]
        assert reversed_shares([3, 3, 4]).tolist() == [0.3, 0.4, 0.3]

    def test_another_number_of_experts_is_refused_before_training(self):
        with pytest.raises(ValueError, match="SadeLoss trains 3 experts, not 2: set --num_experts 3"):
            SadeLoss(COUNTS)(LOGITS, LABELS)
        with pytest.raises(ValueError, match="SadeLoss trains 3 experts, not 4: set --num_experts 3"):
            make_objective(DIGITS_LT_RESNET32.with_overrides(loss="sade", num_experts=4), COUNTS)


@pytest.mark.parametrize(
    "criterion",
    [
        CrossEntropyLoss(),
        ReweightedCrossEntropyLoss([60, 30, 10], beta=0.99),
        LogitAdjustedLoss([60, 30, 10], 0.5),
        BalancedSoftmaxLoss([60, 30, 10]),
        ExpertLogitAdjustedLoss([60, 30, 10], [0.0, 0.5, 2.0]),
        SadeLoss([60, 30, 10]),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
def test_the_learned_prior_is_that_of_logits_that_minimise_the_loss(criterion):
    """On a feature of two values, whose share in each class is known: the logits are its log likelihood and a prior."""
    images = torch.tensor([[40, 10, 2], [20, 20, 8]])  # (value, class)
    value, label = (
        index.repeat_interleave(images.flatten()) for index in torch.cartesian_prod(*map(torch.arange, (2, 3))).T
    )
    logits = torch.zeros(2, 3, 3, requires_grad=True)  # (value, expert, class)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = criterion(logits[value], label)
        loss.backward()
        return loss

    optimizer.step(closure)
    log_shares = torch.tensor([0.6, 0.3, 0.1]).log()
    likelihood = (images / images.sum(dim=0)).log()
    expected = likelihood + criterion.learned_prior(log_shares, reweight=False)
    found = logits.detach().mean(dim=1)
    torch.testing.assert_close(  # a few iterations in float32
        found - found.mean(dim=1, keepdim=True), expected - expected.mean(dim=1, keepdim=True), atol=5e-3, rtol=0
    )


def test_reweighting_is_a_prior_too():
    log_shares = torch.tensor([81.0, 16.0, 1.0]).log()
    for criterion in (RideLoss(COUNTS), LDAMLoss(COUNTS), CollaborativeLoss(COUNTS)):
        assert torch.equal(criterion.learned_prior(log_shares, reweight=False), log_shares)
        weighted = log_shares + effective_number_weights(COUNTS).log()
        torch.testing.assert_close(criterion.learned_prior(log_shares, reweight=True), weighted)
