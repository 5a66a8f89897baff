"""Your own images on a pre-trained backbone."""

from ride_bf.recipes.recipe import TrainingRecipe

PROBE = TrainingRecipe(
    name="probe",
    description="""Your own images, on the features of a frozen pre-trained backbone, which --backbone names. Each image
goes through the backbone once. One cosine classifier starts from the mean features of the classes and learns with the
logit-adjusted loss. The recipe is ours.""",
    dataset="custom",
    backbone="facebook/dinov2-small",
    network={
        "num_experts": 1,
        "classifier": "cosine",
        "cosine_scale": 25.0,
        "batchformer": "none",
        "standardise_features": True,
    },
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

RECIPES = (PROBE,)
