"""Networks and losses against numbers made by running the authors' released code (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configuration_ride_bf import RideBfConfig
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.methods.losses import RideLoss
from ride_bf.methods.objectives import ClassificationObjective, SharedClassifierObjective
from ride_bf.reference.checkpoints import convert_key, convert_state_dict

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4  # relative: float32 on another machine sums in another order

CONFIGS = {
    "imagenet_stem_basic_block_insert": {
        "stem_type": "imagenet",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [64, 128, 16, 32],
        "num_shared_stages": 2,
        "batchformer": "insert",
    },
    "cifar_stem_shared_classifier": {
        "stem_type": "cifar",
        "depths": [1, 1, 1],
        "hidden_sizes": [16, 24, 48],
        "num_shared_stages": 1,
        "batchformer": "shared_classifier",
    },
}


class GoldenCase:
    """A network with the authors' weights, their input and what their code made of it."""

    def __init__(self, name):
        config = RideBfConfig(block_type="basic", num_labels=12, batchformer_dropout=0.0, **CONFIGS[name])
        self.shared_stages = config.num_shared_stages
        self.facts = json.loads((GOLDEN / f"{name}.json").read_text())
        self.expected = load_file(GOLDEN / f"{name}.expected.safetensors")
        weights = {k: v.float() for k, v in load_file(GOLDEN / f"{name}.weights.safetensors").items()}
        self.model = RideBfForImageClassification(config)
        missing = self.model.load_state_dict(convert_state_dict(weights, self.shared_stages, cosine=True), strict=False)
        assert not missing.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
        shape = self.facts["input_shape"]
        count = torch.Size(shape).numel()
        self.pixel_values = torch.sin(torch.arange(count, dtype=torch.float64) * 0.37).float().reshape(shape)
        self.labels = self.expected["labels"].long()
        arguments = self.facts["loss"]
        criterion = RideLoss(
            self.facts["class_counts"],
            diversity_factor=arguments.get("additional_diversity_factor", -0.2),
            reweight_factor=arguments.get("reweight_factor", 0.05),
        )
        shared = config.batchformer == "shared_classifier"
        self.objective = SharedClassifierObjective(criterion) if shared else ClassificationObjective(criterion)


@pytest.fixture(params=CONFIGS)
def case(request):
    return GoldenCase(request.param)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * expected.abs().max().item())


def test_eval_logits(case):
    case.model.eval()
    with torch.no_grad():
        assert_close(case.model(case.pixel_values).logits, case.expected["eval_logits"])
        alone = case.model(case.pixel_values[:1]).logits
    assert_close(alone.flatten(), case.expected["eval_logits_of_image_0_alone"].flatten())


def test_train_logits_and_running_statistics(case):
    case.model.train()
    outputs = case.model(case.pixel_values)
    if case.model.config.batchformer == "insert":
        assert_close(outputs.expert_logits, case.expected["train_expert_logits"])
    else:
        assert_close(outputs.batchformer_expert_logits, case.expected["train_expert_logits"])
        assert_close(outputs.expert_logits, case.expected["train_expert_logits_without_batchformer"])
    state = case.model.state_dict()
    prefix = "running_mean_after_one_train_forward/"
    running = {key.removeprefix(prefix): value for key, value in case.expected.items() if key.startswith(prefix)}
    assert running
    for key, value in running.items():
        assert_close(state[convert_key(key, case.shared_stages)], value)


@pytest.mark.parametrize(("when", "reweight"), [("before", False), ("after", True)])
def test_loss_and_gradients(case, when, reweight):
    case.model.train()
    loss = case.objective(case.model(case.pixel_values), {"labels": case.labels}, reweight=reweight)
    assert loss.item() == pytest.approx(case.facts[f"train_loss_{when}_reweighting"], rel=TOLERANCE)
    loss.backward()
    expected = case.facts[f"gradient_norms_{when}_reweighting"]
    parameters = dict(case.model.named_parameters())
    assert len(expected) == len(parameters)
    for key, norm in expected.items():
        gradient = parameters[convert_key(key, case.shared_stages)].grad
        assert gradient.norm().item() == pytest.approx(norm, rel=TOLERANCE), key
