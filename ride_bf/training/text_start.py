"""Class vectors from text: what the text tower of a CLIP or SigLIP model makes of the names of the classes.

The start is that of LIFT. Shi et al.: Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts, 2024.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data.notices import some
from ride_bf.runs.models import check_weights
from ride_bf.training.backbone import from_place

# Two-tower models of transformers -> how their text is padded in their training.
PADDING: dict[str, str] = {"clip": "longest", "siglip": "max_length", "siglip2": "max_length"}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "*.model")
_TEXTS_AT_ONCE = 256
_CODE = re.compile(r"[a-z]?\d+", re.IGNORECASE)  # a number, or an id such as WordNet's n01440764


def text_class_vectors(
    place: str, names: Sequence[str], prompts: Sequence[str], device: torch.device | str = "cpu"
) -> Tensor:
    """Class vectors (C, D) of length 1, in the space of the features that the vision tower's pooler gives.

    Let t be the text features (P,) of a class: of each prompt normalised, then their mean normalised. In SigLIP the
    pooler's features v are in the space of the text already, and t is the class vector. A cosine classifier then
    computes exactly the cosines of zero-shot classification. In CLIP, zero-shot classification projects v by W (P, D):
    its logits are those of cos(W v, t). As <W v, t> = <v, W^T t>, the class vector is W^T t, normalised:

        cos(v, W^T t) = cos(W v, t) |W v| / (|v| |W^T t|)

    The factor |W v| / |v| is of the image. It does not change the order of the classes. The factor 1 / |W^T t| is of
    the class: LIFT's start differs from zero-shot classification as far as the lengths of W^T t differ.

    Args:
        place: Hub id or folder of the two-tower model with its tokenizer. Both are only used here.
        names: of the classes (C,). An underscore stands for a space.
        prompts: texts with {} for the name.
        device: where the text tower runs.

    Raises ValueError, with the remedy, for a model without a text tower or tokenizer, and for a text that is longer
    than the tower takes.
    """
    config = from_place(place, lambda name: AutoConfig.from_pretrained(name, trust_remote_code=False))
    if config.model_type not in PADDING:
        raise ValueError(
            f"the backbone {place}, a {config.model_type} model, has no text tower that fits its features; name a "
            f"whole model of the kind {' or '.join(PADDING)}, such as openai/clip-vit-base-patch16, or set "
            "--classifier_init class_means"
        )
    tokenizer = _load_tokenizer(place)
    tokens = [_tokens(place, tokenizer, config, [prompt_for(prompt, name) for name in names]) for prompt in prompts]
    model, report = from_place(place, lambda name: AutoModel.from_pretrained(name, output_loading_info=True))
    try:
        check_weights(report)
    except ValueError as error:
        raise ValueError(f"the backbone {place} is damaged: {error}; download it again") from error
    model = model.float().eval().to(device)
    features = torch.stack([F.normalize(_text_features(model, some_tokens), dim=1) for some_tokens in tokens])
    vectors = F.normalize(features.mean(dim=0), dim=1)  # (prompts, C, P) -> (C, P)
    if config.model_type == "clip":
        vectors = F.normalize(vectors @ model.visual_projection.weight.detach(), dim=1)  # (C, P) -> (C, D)
    return vectors.cpu()


def prompt_for(prompt: str, name: str) -> str:
    """The text about a class."""
    return prompt.replace("{}", name.replace("_", " "))


def check_names_are_words(names: Sequence[str]) -> None:
    """Raises ValueError for names whose last part is a number or an id, which mean nothing to a text tower."""
    if codes := [name for name in names if _CODE.fullmatch(name.rpartition("/")[2])]:
        raise ValueError(
            f"classifier_init text needs names that say what the classes are, not {some(codes)}; give them in a file "
            "with --class_names"
        )


def _load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    without = f"the backbone {place} has no tokenizer: save one beside it, or set --classifier_init class_means"
    if os.path.isdir(place) and not any(path for name in _TOKENIZER_FILES for path in Path(place).glob(name)):
        raise ValueError(without)  # transformers may make an empty one
    try:
        return from_place(place, lambda name: AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    except ValueError as error:
        if "sentencepiece" in str(error.__cause__).lower():
            raise ValueError(f"the tokenizer of {place} needs sentencepiece: pip install sentencepiece") from error
        raise


def _tokens(
    place: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, texts: list[str]
) -> dict[str, Tensor]:
    """The tokens (C, T) of texts, padded as the model knows it. Raises ValueError for a text that is too long."""
    longest, known = config.text_config.max_position_embeddings, config.text_config.vocab_size
    ids = tokenizer(texts)["input_ids"]
    if too_long := [text for text, own in zip(texts, ids, strict=True) if len(own) > longest]:
        raise ValueError(
            f"the text tower of {place} takes {longest} tokens, and {too_long[0]!r} has more; shorten --prompt, or "
            "the name of the class with --class_names"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids) or max(map(max, ids)) >= known:
        raise ValueError(
            f"the tokenizer of the backbone {place} has {len(tokenizer)} tokens, and its text tower {known}: it is of "
            "another model; save the right one beside it"
        )
    padding = PADDING[config.model_type]
    length = longest if padding == "max_length" else None
    return dict(tokenizer(texts, padding=padding, max_length=length, return_tensors="pt"))


@torch.no_grad()
def _text_features(model: PreTrainedModel, tokens: dict[str, Tensor]) -> Tensor:
    """Features (C, P) of texts, in the space that both towers share."""
    count = len(tokens["input_ids"])
    parts = []
    for start in range(0, count, _TEXTS_AT_ONCE):
        rows = {name: values[start : start + _TEXTS_AT_ONCE].to(model.device) for name, values in tokens.items()}
        parts.append(model.get_text_features(**rows).pooler_output)
    return torch.cat(parts)
