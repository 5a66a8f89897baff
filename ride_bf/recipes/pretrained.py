"""Recipes on a pre-trained backbone: for your own images, and LIFT."""

from dataclasses import replace

from ride_bf.recipes.recipe import TrainingRecipe

_COSINE_HEAD = {"num_experts": 1, "classifier": "cosine", "cosine_scale": 25.0, "batchformer": "none"}

PROBE = TrainingRecipe(
    name="probe",
    description="""Your own images, on the features of a frozen pre-trained backbone, which --backbone names. Each image
goes through the backbone once. One cosine classifier starts from the mean features of the classes and learns with the
logit-adjusted loss. The recipe is ours.""",
    dataset="custom",
    backbone="facebook/dinov2-small",
    network={**_COSINE_HEAD, "standardise_features": True},
    image_size=None,
    crop="whole",
    augmentation="none",
    train_only="heads",
    classifier_init="class_means",
    loss="logit_adjusted",
    epochs=30,
    batch_size=128,
    learning_rate=0.01,
    weight_decay=5e-4,
    schedule="cosine_by_step",
    warmup_epochs=0,
)

LORA = replace(
    PROBE,
    name="lora",
    description="""Your own images, on a pre-trained backbone, which --backbone names and LoRA adapts (Hu et al., 2022).
One cosine classifier starts from the mean features of the classes and learns with the logit-adjusted loss. Every linear
layer and convolution in the blocks of the backbone has LoRA, of rank and alpha 16 as in PEFT's guide to image
classification. The other settings are ours.""",
    augmentation="imagenet",
    train_only="lora",
    epochs=20,
    optimizer="adamw",
    learning_rate=5e-4,
    weight_decay=0.01,
    warmup_epochs=1,
)
FINETUNE = replace(
    LORA,
    name="finetune",
    description="""Your own images, on a pre-trained backbone, which --backbone names and which learns as a whole. One
cosine classifier starts from the mean features of the classes and learns with the logit-adjusted loss. AdamW, the
weight decay 0.05 and the decay of the learning rate from layer to layer, 0.75, are those with which MAE is fine-tuned
(He et al., 2022). The other settings are ours.""",
    train_only="all",
    learning_rate=2e-4,
    layer_learning_rate_decay=0.75,
    freeze_batch_norm=True,
    weight_decay=0.05,
)
_EXPERTS = {
    "num_experts": 3,
    "batchformer": "shared_classifier",
    "batchformer_layer_scale_init_value": 0.0,
}


def _with_experts(recipe: TrainingRecipe, **network: int) -> TrainingRecipe:
    """A recipe with three experts, which all learn with the logit-adjusted loss, and the gated BatchFormer."""
    return replace(
        recipe,
        name=f"{recipe.name}_experts",
        description=f"""{recipe.name} with three experts and the gated BatchFormer. Each expert learns with the
logit-adjusted loss. It has not been measured whether that is better. The recipe is ours.""",
        network={**recipe.network, **_EXPERTS, **network},
        loss="expert_logit_adjusted",
        batchformer_loss_weight=0.1,  # of the weights in docs/results.md, the one that does no harm
    )


LIFT_CLIP_VIT_B16 = TrainingRecipe(
    name="lift_clip_vit_b16",
    description="""ImageNet-LT on CLIP's ViT-B/16, with the settings of LIFT: Shi et al., Long-Tail Learning with
Foundation Model: Heavy Fine-Tuning Hurts, 2024. A cosine classifier starts from the names of the classes, which CLIP's
text tower reads, and learns with the logit-adjusted loss. --dataset trains other data sets. For iNaturalist 2018, LIFT
trains 20 epochs; give the names of its classes with --class_names.
It differs from LIFT in one thing: LoRA adapts the blocks, in place of AdaptFormer modules.
Published for LIFT, with AdaptFormer and five crops: ImageNet-LT 78.3, Places-LT 52.2, CIFAR-100-LT 81.7. The five crops
are python -m ride_bf.evaluate --views five_crop.""",
    dataset="imagenet_lt",
    backbone="openai/clip-vit-base-patch16",
    network={**_COSINE_HEAD, "backbone_pooling": "pooler"},
    image_size=None,
    augmentation="inaturalist",
    train_only="lora",
    classifier_init="text",
    loss="logit_adjusted",
    epochs=10,
    batch_size=128,
    learning_rate=0.01,
    nesterov=False,
    weight_decay=5e-4,
    schedule="cosine",
    warmup_epochs=0,
)

RECIPES = (
    PROBE,
    LORA,
    FINETUNE,
    _with_experts(PROBE, expert_adapter_size=256),
    _with_experts(LORA, num_expert_layers=1),
    _with_experts(FINETUNE, num_expert_layers=1),
    LIFT_CLIP_VIT_B16,
)
