"""Variants of a recipe: RIDE alone, distillation, a router, and baselines with one expert."""

from dataclasses import replace
from typing import Literal

from ride_bf.recipes.networks import FULL_WIDTHS
from ride_bf.recipes.recipe import TrainingRecipe


def ride_alone(base: TrainingRecipe, **changes) -> TrainingRecipe:
    """The recipe without BatchFormer."""
    return replace(
        base,
        name=f"{base.name}_ride",
        description=f"{base.name} without BatchFormer: RIDE alone. Published: see {base.name}.",
        network={**base.network, "batchformer": "none"},
        **changes,
    )


def distilled(base: TrainingRecipe, **changes) -> TrainingRecipe:
    """The recipe with a teacher, which `--teacher` names. The authors' teacher is a RIDE with six experts."""
    return replace(
        base,
        name=f"{base.name}_distilled",
        description=f"{base.name} with distillation; needs --teacher. The authors' teacher has six experts "
        "(--num_experts 6 trains one). Nothing is published for it with BatchFormer.",
        needs_teacher=True,
        **changes,
    )


def router(base: TrainingRecipe, top_k: int) -> TrainingRecipe:
    """Stage 2 of RIDE: expert assignment on a trained model, which `--init_from` names."""
    return replace(
        base,
        name=f"{base.name}_router",
        description=f"Expert assignment, RIDE's second stage, on a model of {base.name}; needs --init_from. Only the "
        "router is trained. The BatchFormer is left out, as in evaluation, so the router trains on the logits that it "
        "will see.",
        network={**base.network, "batchformer": "none", "router": True, "router_top_k": top_k},
        train_only="router",
        sampler="class_balanced",
        epochs=5,
        batch_size=512 if base.batch_size > 64 else base.batch_size,
        learning_rate=0.01,
        weight_decay=5e-4,
        schedule="cosine",
        lr_steps=(),
        warmup_epochs=0,
        reweight_epoch=None,
    )


def one_expert(base: TrainingRecipe, loss: Literal["cross_entropy", "ldam"], **changes) -> TrainingRecipe:
    """A baseline: a plain ResNet of full width, trained for as long."""
    short, classifier = ("ce", "linear") if loss == "cross_entropy" else ("ldam_drw", "cosine")
    network = {
        **base.network,
        "batchformer": "none",
        "num_experts": 1,
        "hidden_sizes": FULL_WIDTHS[base.network["stem_type"]],
        "classifier": classifier,
    }
    return replace(
        base,
        name=f"{base.name}_{short}",
        description=f"Baseline to {base.name}: one expert of full width, {loss}, the same schedule.",
        network=network,
        loss=loss,
        **changes,
    )
