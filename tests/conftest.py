import os
from pathlib import Path

# Nothing in the tests may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Networks this small are no faster on more threads, and another number of threads sums in another order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from no_skips import *  # noqa: F403  its hooks are this file's

from configuration_ride_bf import RideBfConfig
from modeling_ride_bf import RideBfForImageClassification

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent

TINY_NETWORKS = {
    "cifar": {"stem_type": "cifar", "block_type": "basic", "depths": [1, 2], "hidden_sizes": [4, 8]},
    "imagenet_basic": {"stem_type": "imagenet", "block_type": "basic", "depths": [1, 1], "hidden_sizes": [4, 8]},
    "bottleneck": {"stem_type": "imagenet", "block_type": "bottleneck", "depths": [2, 1], "hidden_sizes": [4, 8]},
    "resnext": {
        "stem_type": "imagenet",
        "block_type": "bottleneck",
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "groups": 4,
        "width_per_group": 8,
    },
}


def tiny_config(network="cifar", **options):
    settings = {"num_labels": 5, "num_shared_stages": 1, "batchformer_dropout": 0.0, **TINY_NETWORKS[network]}
    return RideBfConfig(**{**settings, **options})


def tiny_model(network="cifar", **options):
    torch.manual_seed(0)
    return RideBfForImageClassification(tiny_config(network, **options))


@pytest.fixture
def images():
    return torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 3, 4, 0])
