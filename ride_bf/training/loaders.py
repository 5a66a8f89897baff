"""The loaders of a run: of images, or of the features of a frozen backbone."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from transformers import BitImageProcessor

from data import (
    BrokenImageError,
    FinishedBatches,
    ImageStream,
    OnBrokenImage,
    TrainBatch,
    class_counts,
    class_labels,
    evaluation_batches,
    find_entry,
    read_image,
    train_transform,
    training_batches,
)
from data.loaders import Shuffle, draws_loader, view_batches
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.methods.samplers import INSTANCE, LongTailedSampler
from ride_bf.recipes import TrainingRecipe
from ride_bf.runs.run_folder import BROKEN_IMAGES
from ride_bf.training.arguments import RunArguments
from ride_bf.training.features import FeatureCache, FeatureRows, as_it_is, feature_batches
from ride_bf.training.heads import starts_from_features
from ride_bf.training.lora import merged


class RunLoaders:
    """Makes the loaders of a run.

    Args:
        splits: from `load_long_tailed`.
        processor: prepares the images for evaluation.
        run, recipe, accelerator: of the run.
        model: the network; the loaders of a frozen backbone compute its features.
    """

    def __init__(
        self,
        splits: dict[str, Dataset | ImageStream],
        processor: BitImageProcessor,
        run: RunArguments,
        recipe: TrainingRecipe,
        accelerator: Accelerator,
        model: RideBfForImageClassification,
    ):
        self.splits, self.processor, self.run, self.recipe = splits, processor, run, recipe
        self.accelerator, self.model = accelerator, model
        where = partial(find_entry, recipe.dataset, run.data_dir, lists=run.dataset_options.get("lists"))
        self.on_broken = OnBrokenImage(run.on_broken_image, where, Path(run.output_dir) / BROKEN_IMAGES)
        self._cache: FeatureCache | None = None
        self._centre: dict[str, FeatureRows] = {}  # the start of the heads and the loaders take the same

    def make(self) -> dict[str, FinishedBatches]:
        """A prepared loader for each split. The training loader shuffles and augments."""
        loaders = {name: self._evaluation(name) for name in self.splits if name != "train"}
        from_features = self.training_views and not self.run.dry_run  # which computes none
        loaders["train"] = self._training_features() if from_features else self._training_images()
        return loaders

    @property
    def has_features(self) -> bool:
        """Whether each image goes through the backbone once: it is frozen, and all experts share it."""
        streamed = any(isinstance(split, ImageStream) for split in self.splits.values())
        shares = getattr(self.model.ride_bf.trunk, "whole", False)
        return self.recipe.train_only == "heads" and shares and not streamed and self.run.teacher is None

    @property
    def training_views(self) -> int:
        """Views of each training image whose features are computed once; 0: all views go through the backbone."""
        recipe = self.recipe
        mixes = recipe.mixup_alpha + recipe.cutmix_alpha > 0
        if not self.has_features or mixes:
            return 0
        return recipe.feature_views or (0 if recipe.varies_images else 1)

    @property
    def images_seen_once(self) -> int:
        """Images of all splits, with their views, whose features are computed before training. 0 if none are."""
        if not self.training_views:
            return 0
        others = sum(len(split) for name, split in self.splits.items() if name != "train")
        # The heads start from images as evaluation sees them, which training sees too if it does not vary them.
        starts = self.run.init_from is None and starts_from_features(self.model, self.recipe)
        centre = self.recipe.varies_images and starts
        return (self.training_views + centre) * len(self.splits["train"]) + others

    def centre_features(self, name: str) -> FeatureRows:
        """The features of a split's images, seen as in evaluation."""
        if name not in self._centre:
            facts, split = self._reading(), self.splits[name]
            rows = self._features().rows(split, self._images, self._still_broken, facts, name)
            self._centre[name] = rows
        return self._centre[name]

    def _still_broken(self, image: dict) -> bool:
        """Reports an image that cannot be read, as the loaders of images do."""
        try:
            read_image(image, self.run.max_image_pixels)
        except BrokenImageError as error:
            self.on_broken(image, error)
            return True
        return False

    def _reading(self) -> dict[str, Any]:
        """How an image becomes what the backbone sees in evaluation."""
        processor = {key: value for key, value in self.processor.to_dict().items() if "version" not in key}
        return {"processor": processor, "max_image_pixels": self.run.max_image_pixels}

    def _features(self) -> FeatureCache:
        if self._cache is None:
            self._cache = FeatureCache(merged(self.model.to(self.accelerator.device)), self.accelerator)
        return self._cache

    def _images(self, split: Dataset | ImageStream) -> FinishedBatches:
        run = self.run
        return evaluation_batches(
            split,
            self.processor,
            run.eval_batch_size,
            run.num_workers,
            self.accelerator,
            self.on_broken,
            run.max_image_pixels,
        )

    def _evaluation(self, name: str) -> FinishedBatches:
        if not self.has_features or self.run.dry_run:
            return self._images(self.splits[name])
        return feature_batches(self.centre_features(name), self.run.eval_batch_size, self.accelerator)

    def _augmented(self) -> dict[str, Any]:
        """How training sees images: the transform of each and what finishes a batch."""
        recipe, run = self.recipe, self.run
        transform = train_transform(
            recipe.augmentation,
            recipe.image_size,
            recipe.auto_augment,
            self.on_broken,
            run.max_image_pixels,
            self.processor,
            recipe.jpeg_scaling,
        )
        finish = TrainBatch(
            recipe.augmentation, recipe.image_mean, recipe.image_std, recipe.mixup_alpha, recipe.cutmix_alpha
        )
        return {"transform": transform, "finish": finish, "num_workers": run.num_workers, "seed": run.seed}

    def _training_images(self) -> FinishedBatches:
        recipe = self.recipe
        return training_batches(
            self.splits["train"],
            batch_size=recipe.batch_size // recipe.gradient_accumulation_steps,
            accelerator=self.accelerator,
            sampler=make_sampler(self.splits["train"], recipe, self.run.seed),
            passes=recipe.passes_per_epoch,
            batches_per_step=recipe.gradient_accumulation_steps,
            **self._augmented(),
        )

    def _training_features(self) -> FinishedBatches:
        """The batches of `_training_images`, of features."""
        recipe, run, accelerator, split = self.recipe, self.run, self.accelerator, self.splits["train"]
        if not recipe.varies_images:
            rows = self.centre_features("train")
        else:
            names = ("augmentation", "auto_augment", "image_size", "image_mean", "image_std")
            facts = self._reading() | {name: getattr(recipe, name) for name in names} | {"seed": run.seed}
            facts |= {"jpeg_scaling": True} if recipe.jpeg_scaling else {}

            def loader(split: Dataset) -> FinishedBatches:
                return view_batches(split, batch_size=run.eval_batch_size, accelerator=accelerator, **self._augmented())

            rows = self._features().rows(split, loader, self._still_broken, facts, "training", self.training_views)
        order = make_sampler(split, recipe, run.seed) or Shuffle(len(split), recipe.passes_per_epoch, run.seed)
        batch_size = recipe.batch_size // recipe.gradient_accumulation_steps // accelerator.num_processes
        rows = replace(rows, full_batch=batch_size)
        loader = draws_loader(rows, order, accelerator, batch_size=batch_size, collate_fn=as_it_is)
        return FinishedBatches(accelerator.prepare(loader), as_it_is, seed=(run.seed, accelerator.process_index))


def make_sampler(split: Dataset | ImageStream, recipe: TrainingRecipe, seed: int) -> LongTailedSampler | None:
    """The sampler of the training images; None if each image comes once an epoch, in random order."""
    if recipe.sampler == INSTANCE:
        return None
    counts = class_counts(split)
    draws = draws_per_epoch(counts, recipe)
    return LongTailedSampler(class_labels(split), len(counts), recipe.sampler, draws, recipe.epochs, seed)


def draws_per_epoch(counts: list[int], recipe: TrainingRecipe) -> int:
    """Number of images drawn in an epoch, from the training images of each class (C,)."""
    if recipe.sampler != INSTANCE and recipe.sampler_epoch == "largest_class":
        return len(counts) * max(counts)
    return sum(counts) * recipe.passes_per_epoch
