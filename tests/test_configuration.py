import pytest
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassError

from configuration_ride_bf import RideBfConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_type": "wide"}, "'basic', 'bottleneck'"),
        ({"stem_type": "cifar10"}, "'imagenet', 'cifar'"),
        ({"classifier": "euclidean"}, "'linear', 'cosine'"),
        ({"batchformer": "both"}, "'none', 'insert', 'shared_classifier'"),
        ({"depths": [3, 4, 6]}, "one entry for each stage"),
        ({"depths": []}, "one entry for each stage"),
        ({"depths": [3, 0, 6, 3]}, "must all be 1 or more"),
        ({"num_experts": 0}, "num_experts must be 1 or more, not 0"),
        ({"num_experts": 2.5}, "expected int"),
        ({"num_shared_stages": 4}, "num_shared_stages must be 0 to 3"),
        ({"cosine_scale": 0}, "cosine_scale must be positive"),
        ({"batchformer_num_layers": 0}, "batchformer='none'"),
        ({"batchformer_dropout": 1.0}, r"in \[0, 1\)"),
        ({"batchformer": "insert", "batchformer_num_heads": 7}, "must divide the feature size 1536"),
        ({"block_type": "basic", "groups": 32}, "need block_type 'bottleneck'"),
        ({"groups": 32, "width_per_group": 0}, "both be 1 or more"),
        ({"width_per_group": 0}, "both be 1 or more"),
        ({"hidden_sizes": [8, 128, 192, 384], "groups": 32, "width_per_group": 4}, "no channel"),
        ({"stem_type": "cifar", "block_type": "basic", "hidden_sizes": [64, 32, 32, 64]}, "must not decrease"),
        ({"router": True, "num_experts": 1}, "num_experts of 2 or more"),
        ({"router": True, "num_labels": 99, "router_threshold": 1.5}, "router_threshold must be 0 to 1, not 1.5"),
        ({"router": True, "num_labels": 10}, "router_top_k must be 1 to num_labels = 10, not 30"),
    ],
)
def test_impossible_values_are_refused_with_the_reason(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        RideBfConfig(**options)


def test_misspelt_option_is_refused():
    with pytest.raises(TypeError, match=r"unknown options \['num_expert'\].*num_experts"):
        RideBfConfig(num_expert=3)


def test_option_of_a_later_version_in_a_file_is_kept(tmp_path):
    config = tiny_config()
    written = config.to_dict() | {"transformers_version": "9.0.0", "new_in_nine": True}
    assert RideBfConfig.from_dict(written).new_in_nine is True


def test_survives_saving(tmp_path):
    config = tiny_config("resnext", num_labels=3, batchformer="insert", batchformer_layer_scale_init_value=0.0)
    config.id2label = {0: "cat", 1: "dog", 2: "axolotl"}
    config.save_pretrained(tmp_path)
    loaded = RideBfConfig.from_pretrained(tmp_path)
    before, after = config.to_dict(), loaded.to_dict()
    assert {k: v for k, v in after.items() if k != "transformers_version"} == {
        k: v for k, v in before.items() if k != "transformers_version"
    }


def test_heads_do_not_matter_without_batchformer():
    odd = {"block_type": "basic", "depths": [1, 1], "hidden_sizes": [64, 130], "num_shared_stages": 1}
    RideBfConfig(**odd, batchformer="none")
    with pytest.raises(StrictDataclassError, match="must divide the feature size 130"):
        RideBfConfig(**odd, batchformer="insert")


def test_heads_follow_the_paper_unless_chosen():
    assert RideBfConfig().num_batchformer_heads == 4  # features of 1536
    assert tiny_config().num_batchformer_heads == 1  # of 8
    assert tiny_config(batchformer_num_heads=2).num_batchformer_heads == 2
