"""The networks of the papers, as options of `RideBfConfig`."""

RESNET32 = {
    "stem_type": "cifar",
    "block_type": "basic",
    "depths": [5, 5, 5],
    "hidden_sizes": [16, 24, 48],
    "num_experts": 3,
    "num_shared_stages": 1,
}

RESNET10 = {
    "stem_type": "imagenet",
    "block_type": "basic",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [64, 128, 192, 384],
    "num_experts": 3,
    "num_shared_stages": 2,
}

RESNET50 = {**RESNET10, "block_type": "bottleneck", "depths": [3, 4, 6, 3]}

RESNEXT50 = {**RESNET50, "groups": 32, "width_per_group": 4}


# Stage widths of the plain ResNets. The networks above are narrower.
FULL_WIDTHS = {"cifar": [16, 32, 64], "imagenet": [64, 128, 256, 512]}
