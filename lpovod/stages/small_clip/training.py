"""The contrastive training of the small CLIP."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from lpovod.artifacts import atomic
from lpovod.config import SmallClipSettings
from lpovod.progress import progress
from lpovod.stages.small_clip.captions import BACKGROUND, COLOURS, TEMPLATES, caption
from lpovod.stages.small_clip.crops import Crops

# ---------------------------------------------------------------------------------- training


def architecture(settings: SmallClipSettings, vocabulary_size: int) -> dict:
    """The model in open_clip's config format."""
    return {
        "embed_dim": settings.dimension,
        "vision_cfg": {
            "image_size": settings.image_size,
            "timm_model_name": "small_convnet",
        },
        "text_cfg": {
            "context_length": settings.context_length,
            "vocab_size": vocabulary_size,
            "width": settings.text_width,
            "heads": settings.text_width // 32,
            "layers": settings.text_layers,
        },
    }


def initial_model(config: dict, seed: int) -> CLIP:
    torch.manual_seed(seed)
    model = CLIP(**config, init_logit_scale=math.log(10))
    # The end token, which attends to the words, represents the text. With CLIP's own 0.02 for the
    # words, or an end token as strong as they are, all texts look alike for the first epochs, and
    # the model learns nothing.
    torch.nn.init.normal_(model.token_embedding.weight, std=0.5)
    with torch.no_grad():
        model.token_embedding.weight[-2:].normal_(std=0.02)
    return model.to(memory_format=torch.channels_last)


class _CaptionSampler:
    """Random captions of crops as tokens, from a table of all captions."""

    def __init__(self, tokenizer: SimpleTokenizer, generator: torch.Generator) -> None:
        self.generator = generator
        colours = [None, *range(len(COLOURS))]
        texts = [
            caption(*combination)
            for combination in product(range(BACKGROUND + 1), colours, range(len(TEMPLATES)))
        ]
        shape = (BACKGROUND + 1, len(colours), len(TEMPLATES), tokenizer.context_length)
        self.table = tokenizer(texts).view(shape)

    def __call__(self, classes: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, L), and the colour that each caption names (N,), -1 for none."""
        count = len(classes)
        named = torch.rand(count, generator=self.generator) < 0.25
        colours = torch.where(named, colours, -1)
        templates = torch.randint(len(TEMPLATES), (count,), generator=self.generator)
        return self.table[classes, colours + 1, templates], colours


def contrastive_loss(
    logits: Tensor, classes: Tensor, colours: Tensor, caption_colours: Tensor
) -> Tensor:
    """CLIP's symmetric cross-entropy; every caption that is true of a crop is its target.

    With few classes a batch holds many pairs of equal meaning; CLIP's loss would count them as
    mistakes.

    Args:
        logits: (N, N), crops by captions.
        classes: (N,) of the crops and, in the same order, of the captions.
        colours: (N,) of the crops.
        caption_colours: (N,) as the captions name them, -1 for none.
    """
    same_class = classes[:, None] == classes[None]
    right_colour = (colours[:, None] == caption_colours[None]) | (caption_colours[None] < 0)
    true = (same_class & right_colour).float()
    by_crop = F.cross_entropy(logits, true / true.sum(1, keepdim=True))
    by_caption = F.cross_entropy(logits.T, true.T / true.T.sum(1, keepdim=True))
    return (by_crop + by_caption) / 2


def _rate(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: linear warm-up over 5 % of steps, then cosine to 0."""
    warm_up = max(steps // 20, 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def _optimizer(model: CLIP, settings: SmallClipSettings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def _normalised(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Crops as CLIP's input, (N, 3, S, S) float32, each mirrored with probability 0.5."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(mirrored, pixels.flip(3), pixels)
    pixels = pixels.contiguous(memory_format=torch.channels_last).float().div_(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return pixels.sub_(mean).div_(std)


def train(
    model: CLIP, tokenizer: SimpleTokenizer, crops: Crops, settings: SmallClipSettings
) -> list:
    """Train in place; returns the mean loss of each epoch.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    captions = _CaptionSampler(tokenizer, generator)
    optimizer = _optimizer(model, settings)
    per_epoch = max(len(crops.pixels) // settings.batch_size, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, per_epoch * settings.epochs)
    )
    model.train()
    history = []
    with progress(None, "training", "step", total=per_epoch * settings.epochs) as bar:
        for _ in range(settings.epochs):
            order = torch.randperm(len(crops.pixels), generator=generator)
            losses = []
            for batch in order.split(settings.batch_size)[:per_epoch]:
                losses.append(_step(model, captions, crops, batch, optimizer, generator))
                schedule.step()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
            history.append(round(sum(losses) / len(losses), 4))
            if not math.isfinite(history[-1]):
                raise FloatingPointError(f"loss {history[-1]}: lower `learning_rate`")
    return history


def _step(
    model: CLIP,
    captions: _CaptionSampler,
    crops: Crops,
    batch: Tensor,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> float:
    classes, colours = crops.classes[batch], crops.colours[batch]
    tokens, caption_colours = captions(classes, colours)
    images = model.encode_image(_normalised(crops.pixels[batch], generator), normalize=True)
    texts = model.encode_text(tokens, normalize=True)
    logits = model.logit_scale.exp() * images @ texts.T
    loss = contrastive_loss(logits, classes, colours, caption_colours)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))  # CLIP, section 2.5
    return loss.item()


def write_weights(path: Path, model: CLIP) -> None:
    """Write matrices in half precision, and vectors (among them the variances of norms) in full."""
    state = {
        name: (tensor.half() if tensor.ndim > 1 else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    with atomic(path) as partial:
        partial.write_bytes(save(state))
