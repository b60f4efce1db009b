"""Words that a model does not know, embedded by its CLIP: in its file, or on disk."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from torch import Tensor

from lpovod.artifacts import sha256
from lpovod.clip import (
    Clip,
    TextTower,
    load_clip,
    name_vector,
    read_text_tower,
    text_encoder,
    texts_of,
)
from lpovod.config import ClipSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.model import ModelFile


def encode_names(
    names: Sequence[str], content: ModelFile, prompts: dict[str, str] | None = None
) -> list[np.ndarray]:
    """Embed names.

    Args:
        names: of classes.
        content: of the model file.
        prompts: by name, the text to embed in place of the name in the templates.

    Returns:
        For each name a unit vector (D,) float32.

    Raises:
        LpovodError: if the file has no text tower and CLIP's weights are missing or are others.
    """
    encode, settings = _encoder(content), content.config.text_embeddings
    return [name_vector(encode, texts_of(name, settings, prompts)) for name in names]


def _encoder(content: ModelFile) -> Callable[[list[str]], Tensor]:
    if content.text_tower:
        return text_encoder(TextTower(content.clip, content.text_tower, content.merges))
    return load_model_clip(content).encode_texts


def load_model_clip(content: ModelFile, device: str = "cpu") -> Clip:
    """The run's CLIP, kept for the next word or picture; raises as `clip_of` does."""
    return _load(clip_of(content), content.identity["inputs"]["clip_weights"], device)


@lru_cache(maxsize=2)
def _load(settings: ClipSettings, digest: str, device: str) -> Clip:
    """The digest tells other weights apart."""
    return load_clip(settings, device)


def clip_of(content: ModelFile) -> ClipSettings:
    """The settings of the run's CLIP.

    Raises:
        LpovodError: if the run has none, or its weights are missing or are others.
    """
    settings, recorded = content.config.clip, content.identity["inputs"]["clip_weights"]
    remedy = "or export the model with its text tower: lpovod export --text-tower"
    if settings.weights is None or recorded == "none":
        raise LpovodError("the model's run had no CLIP, which embeds further words")
    if not settings.weights.is_file():
        raise LpovodError(
            f"{settings.weights}: no such file; CLIP embeds words that the model does not know. "
            f"Call this from the project's folder, {remedy}"
        )
    if sha256(settings.weights) != recorded:
        raise LpovodError(
            f"{settings.weights} holds another CLIP than the model's. Restore it, {remedy}"
        )
    return settings


def with_text_tower(content: ModelFile) -> ModelFile:
    """A model that embeds words by itself, with the text tower of the run's CLIP.

    Raises:
        LpovodError: as `clip_of` does.
    """
    tower = read_text_tower(clip_of(content))
    return replace(content, clip=tower.config, text_tower=tower.tensors, merges=tower.merges)
