"""The small CLIP: trained on crops of the miniature world with captions, and written as files.

Like a large CLIP it has seen all classes, in crops of every tightness. It learns to name the object
whether the crop holds all of it, a part, a group or much ground beside it, so it scores some badly
placed boxes as high as good ones; `record.json` has the cosines.
"""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer

from lpovod.artifacts import atomic, sha256
from lpovod.clip import load_clip
from lpovod.config import SmallClipSettings
from lpovod.progress import log
from lpovod.stages.small_clip.captions import write_vocabulary
from lpovod.stages.small_clip.crops import draw_crops
from lpovod.stages.small_clip.training import architecture, initial_model, train, write_weights
from lpovod.stages.small_clip.zero_shot import KINDS, zero_shot

# --------------------------------------------------------------------------------- the stage


def train_small_clip(output_dir: Path, settings: SmallClipSettings) -> dict:
    """Train the small CLIP and write it as four files.

    Args:
        output_dir: gets `architecture.json`, `weights.safetensors`, `vocabulary.txt.gz` (which
            `load_clip` reads) and `record.json` (settings, versions, loss, zero-shot accuracy).
        settings: equal settings on one machine, with one number of threads, give equal files.

    Returns:
        The record.
    """
    started = time.monotonic()
    output_dir = Path(output_dir)
    vocabulary = output_dir / "vocabulary.txt.gz"
    write_vocabulary(vocabulary)
    tokenizer = SimpleTokenizer(str(vocabulary), context_length=settings.context_length)
    config = architecture(settings, tokenizer.vocab_size)
    _write_document(output_dir / "architecture.json", config)
    crops = draw_crops(settings.crops, settings.seed, settings.image_size)
    model = initial_model(config, settings.seed)
    losses = train(model, tokenizer, crops, settings)
    write_weights(output_dir / "weights.safetensors", model)
    minutes = (time.monotonic() - started) / 60
    source = SimpleNamespace(
        architecture=str(output_dir / "architecture.json"),
        weights=output_dir / "weights.safetensors",
        vocabulary=vocabulary,
        pretrained=None,
    )
    clip = load_clip(source)
    record: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "minutes": round(minutes, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "loss_per_epoch": losses,
        "logit_scale": round(clip.logit_scale, 2),
        "weights_sha256": sha256(source.weights),
        "zero_shot": {
            f"nuisance {strength}": zero_shot(
                clip, settings.held_out_scenes, settings.seed + 1, strength
            )
            for strength in (0.5, 1.0)
        },
    }
    _write_document(output_dir / "record.json", record)
    for (strength, scores), kind in product(record["zero_shot"].items(), KINDS):
        accuracy, cosine = scores[kind]["accuracy"], scores[kind]["cosine"]
        log.info(f"{strength}, {kind}: accuracy {accuracy:.3f}, cosine {cosine:.3f}")
    return record


def _write_document(path: Path, content: dict) -> None:
    """Write json for people: indented, in the order of `content`."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
