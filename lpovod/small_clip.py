"""The small CLIP: trained on crops of the miniature world with captions, and given as files.

Like a large CLIP it has seen the world: all classes, at every looseness. It is trained to name what
a crop shows whether the crop holds the whole object, a part of it, a group or much ground beside
it, so it scores some badly placed boxes as high as good ones; `record.json` has the cosines.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from lpovod.artifacts import atomic, sha256
from lpovod.clip import Clip, load_clip
from lpovod.config import SmallClip
from lpovod.miniature import CLASSES, IMAGE_SIZE, Box, DrawnObject, Scene, compose_scene, scene_rng
from lpovod.progress import progress, say

# ---------------------------------------------------------------------------------- captions

BACKGROUND = len(CLASSES)  # caption class of crops that hold no object
TEMPLATES = (
    "{}",
    "{}",  # twice, for it is the prompt at test time
    "a {}",
    "the {}",
    "a photo of a {}",
    "a drawing of a {}",
    "a picture of the {}",
    "a part of a {}",
)
BACKGROUND_WORDS = ("background", "nothing", "an empty place", "lines", "a blurred ground")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 40, 45),
    "orange": (235, 140, 40),
    "yellow": (225, 220, 60),
    "green": (60, 175, 60),
    "cyan": (60, 205, 205),
    "blue": (50, 70, 200),
    "purple": (130, 45, 170),
    "pink": (235, 120, 190),
    "brown": (115, 75, 45),
    "black": (35, 35, 35),
    "white": (228, 228, 228),
    "grey": (130, 130, 130),
}
_COLOUR_VALUES = np.array(list(COLOURS.values()), dtype=np.float64)


def caption(class_index: int, colour: int | None, template: int) -> str:
    """The text of a crop; `colour` counts `COLOURS`, None leaves it out."""
    if class_index == BACKGROUND:
        return BACKGROUND_WORDS[template % len(BACKGROUND_WORDS)]
    name = CLASSES[class_index]
    if colour is not None:
        name = f"{list(COLOURS)[colour]} {name}"
    return TEMPLATES[template].format(name)


def all_captions() -> list[str]:
    colours = [None, *range(len(COLOURS))]
    combinations = product(range(BACKGROUND + 1), colours, range(len(TEMPLATES)))
    return sorted({caption(*combination) for combination in combinations})


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until each of the words is one token.

    Sennrich et al. 2016, algorithm 1, with ties broken by the alphabet.
    """
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while any(len(piece) > 1 for piece in pieces.values()):
        counts = Counter(pair for piece in pieces.values() for pair in pairwise(piece))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        pieces = {word: _merge(piece, pair) for word, piece in pieces.items()}
    return merges


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged, position = [], 0
    while position < len(piece):
        if tuple(piece[position : position + 2]) == pair:
            merged.append(piece[position] + piece[position + 1])
            position += 2
        else:
            merged.append(piece[position])
            position += 1
    return merged


def write_vocabulary(path: Path) -> None:
    """Merges in the format of open_clip's `SimpleTokenizer`: gzip, one header line, no last one."""
    words = sorted({word for text in all_captions() for word in text.split()})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in learn_merges(words))]
    with atomic(path) as partial:
        partial.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


# ------------------------------------------------------------------------------------- crops


@dataclass(frozen=True)
class Crops:
    pixels: Tensor  # (N, 3, S, S) uint8
    classes: Tensor  # (N,) int64 index into CLASSES, or BACKGROUND
    colours: Tensor  # (N,) int64 index into COLOURS, -1 on the background


def crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """CLIP's preprocessing of a box, (size, size, 3) uint8.

    Whole pixels around the box, clipped to the image; bicubic with antialias to shorter side
    `size`; the middle square.
    """
    x1, y1 = (max(math.floor(value), 0) for value in box[:2])
    x2, y2 = min(math.ceil(box[2]), image.width), min(math.ceil(box[3]), image.height)
    width, height = x2 - x1, y2 - y1
    shorter = min(width, height)
    new = (int(size * width / shorter), int(size * height / shorter))
    resized = image.crop((x1, y1, x2, y2)).resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _scaled(box: Box, scale: float, shift: tuple[float, float] = (0.0, 0.0)) -> Box:
    """The box `scale` times as large about its centre, then shifted by parts of its own size."""
    width, height = box[2] - box[0], box[3] - box[1]
    x = (box[0] + box[2]) / 2 + shift[0] * width
    y = (box[1] + box[3]) / 2 + shift[1] * height
    width, height = width * scale, height * scale
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _any_looseness(rng: np.random.Generator, box: Box) -> Box:
    """0.4 to 2 times the box, anywhere that keeps the object within or the crop on it."""
    scale = math.exp(rng.uniform(math.log(0.4), math.log(2)))
    reach = abs(scale - 1) / 2 * 0.9 + 0.06
    return _scaled(box, scale, tuple(rng.uniform(-reach, reach, 2)))


def _union(boxes: list[Box]) -> Box:
    corners = np.array(boxes)
    return (*corners[:, :2].min(0).tolist(), *corners[:, 2:].max(0).tolist())


def group_box(scene: Scene, drawn: DrawnObject) -> Box | None:
    """The box around the whole cluster of an object, None if it stands alone."""
    boxes = [other.box for other in scene.objects if other.item == drawn.item]
    return _union(boxes) if len(boxes) > 1 else None


def _training_box(rng: np.random.Generator, scene: Scene, drawn: DrawnObject) -> Box:
    kind = rng.random()
    group = group_box(scene, drawn)
    inner = [*drawn.parts, *([drawn.copy] if drawn.copy else [])]
    if group and kind < 0.25:
        return _scaled(group, rng.uniform(0.9, 1.5))
    if inner and 0.25 <= kind < 0.4:
        return _scaled(inner[rng.integers(len(inner))], rng.uniform(0.9, 1.6))
    if kind > 0.7:
        return _scaled(drawn.box, rng.choice((1.0, 1.5)))  # the two scales of inference
    return _any_looseness(rng, drawn.box)


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes share, in pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _shows(scene: Scene, box: Box, drawn: DrawnObject) -> bool:
    """Whether the object's class fills more of the crop than any other class does."""
    areas: Counter[str] = Counter()
    for other in scene.objects:
        areas[other.name] += _overlap(box, other.box)
    return areas.most_common(1)[0][0] == drawn.name


def _background_box(rng: np.random.Generator, scene: Scene) -> Box | None:
    for _ in range(8):
        side = rng.uniform(14, 70)
        x, y = rng.uniform(0, IMAGE_SIZE - side, 2)
        box = (x, y, x + side, y + side)
        if sum(_overlap(box, drawn.box) for drawn in scene.objects) < 0.04 * side**2:
            return box
    return None


def _usable(box: Box) -> bool:
    inside = (max(box[0], 0), max(box[1], 0), min(box[2], IMAGE_SIZE), min(box[3], IMAGE_SIZE))
    return min(inside[2] - inside[0], inside[3] - inside[1]) >= 5


def _scene_crops(rng: np.random.Generator, scene: Scene) -> list[tuple[Box, int, int]]:
    """Box, class and colour of what to cut from one scene: two of each object, one of the rest."""
    found = []
    for drawn in (*scene.objects, *scene.objects):
        box = _training_box(rng, scene, drawn)
        if _usable(box) and _shows(scene, box, drawn):
            distances = np.abs(_COLOUR_VALUES - drawn.colour).sum(1)
            found.append((box, CLASSES.index(drawn.name), int(distances.argmin())))
    ground = _background_box(rng, scene)
    return [*found, (ground, BACKGROUND, -1)] if ground else found


def draw_crops(count: int, seed: int, size: int) -> Crops:
    """Cut `count` training crops from scenes of the split "clip", which no data set uses."""
    pixels = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = np.empty((count, 2), dtype=np.int64)
    filled, index = 0, 0
    with progress(None, "crops", "crop", total=count) as bar:
        while filled < count:
            rng = scene_rng(seed, "clip", index)
            scene, index = compose_scene(rng, nuisance=rng.uniform(0.3, 1)), index + 1
            image = Image.fromarray(scene.image)
            for box, class_index, colour in _scene_crops(rng, scene)[: count - filled]:
                pixels[filled] = crop(image, box, size)
                labels[filled] = class_index, colour
                filled += 1
                bar.update()
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # channels_last in memory
    return Crops(channels_first, *torch.from_numpy(labels).unbind(1))


# ---------------------------------------------------------------------------------- training


def architecture(settings: SmallClip, vocabulary_size: int) -> dict:
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


def _initial_model(config: dict, seed: int) -> CLIP:
    torch.manual_seed(seed)
    model = CLIP(**config, init_logit_scale=math.log(10))
    # A text is read off its end token, which attends to the words. Words of CLIP's own .02, or an
    # end as loud as they are, leave all texts alike for the first epochs, and nothing is learned.
    torch.nn.init.normal_(model.token_embedding.weight, std=0.5)
    with torch.no_grad():
        model.token_embedding.weight[-2:].normal_(std=0.02)
    return model.to(memory_format=torch.channels_last)


class _CaptionSampler:
    """Random captions of crops as tokens, from a table of all there are."""

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
        """Tokens (N, L) and which colour each caption names (N,), -1 for none."""
        count = len(classes)
        named = torch.rand(count, generator=self.generator) < 0.25
        colours = torch.where(named, colours, -1)
        templates = torch.randint(len(TEMPLATES), (count,), generator=self.generator)
        return self.table[classes, colours + 1, templates], colours


def contrastive_loss(
    logits: Tensor, classes: Tensor, colours: Tensor, caption_colours: Tensor
) -> Tensor:
    """CLIP's symmetric cross-entropy, with every caption that is true of a crop as its target.

    With so few classes a batch holds many pairs of the same meaning; CLIP's loss would count
    them as mistakes.

    Args:
        logits: (N, N) crops by captions.
        classes: (N,) of crops and, in the same order, of captions.
        colours: (N,) of crops.
        caption_colours: (N,) that the captions name, -1 for none.
    """
    same_class = classes[:, None] == classes[None]
    right_colour = (colours[:, None] == caption_colours[None]) | (caption_colours[None] < 0)
    true = (same_class & right_colour).float()
    by_crop = F.cross_entropy(logits, true / true.sum(1, keepdim=True))
    by_caption = F.cross_entropy(logits.T, true.T / true.T.sum(1, keepdim=True))
    return (by_crop + by_caption) / 2


def _rate(step: int, steps: int) -> float:
    """Part of the highest learning rate: linear warm-up over a twentieth, then cosine to zero."""
    warm_up = max(steps // 20, 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def _optimiser(model: CLIP, settings: SmallClip) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def _normalised(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Crops as CLIP's input, (N, 3, S, S) float32, half of them mirrored."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(mirrored, pixels.flip(3), pixels)
    pixels = pixels.contiguous(memory_format=torch.channels_last).float().div_(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return pixels.sub_(mean).div_(std)


def train(model: CLIP, tokenizer: SimpleTokenizer, crops: Crops, settings: SmallClip) -> list:
    """Train in place; returns the mean loss of each epoch.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    captions = _CaptionSampler(tokenizer, generator)
    optimiser = _optimiser(model, settings)
    per_epoch = max(len(crops.pixels) // settings.batch_size, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: _rate(step, per_epoch * settings.epochs)
    )
    model.train()
    history = []
    with progress(None, "training", "step", total=per_epoch * settings.epochs) as bar:
        for _ in range(settings.epochs):
            order = torch.randperm(len(crops.pixels), generator=generator)
            losses = []
            for batch in order.split(settings.batch_size)[:per_epoch]:
                losses.append(_step(model, captions, crops, batch, optimiser, generator))
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
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
) -> float:
    classes, colours = crops.classes[batch], crops.colours[batch]
    tokens, caption_colours = captions(classes, colours)
    images = model.encode_image(_normalised(crops.pixels[batch], generator), normalize=True)
    texts = model.encode_text(tokens, normalize=True)
    logits = model.logit_scale.exp() * images @ texts.T
    loss = contrastive_loss(logits, classes, colours, caption_colours)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))  # CLIP, section 2.5
    return loss.item()


def _write_weights(path: Path, model: CLIP) -> None:
    """Matrices in half precision; vectors, among them the variances of norms, in full."""
    state = {
        name: (tensor.half() if tensor.ndim > 1 else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    with atomic(path) as partial:
        partial.write_bytes(save(state))


# -------------------------------------------------------------------------------- zero-shot


KINDS = ("ground_truth", "tight", "loose", "part", "group")


def _kind_box(rng: np.random.Generator, scene: Scene, drawn: DrawnObject, kind: str) -> Box | None:
    if kind == "ground_truth":
        return drawn.box
    if kind == "tight":
        return _scaled(drawn.box, 0.5, tuple(rng.uniform(-0.2, 0.2, 2)))
    if kind == "loose":
        return _scaled(drawn.box, 2.0)
    if kind == "group":
        return group_box(scene, drawn)
    return drawn.parts[rng.integers(len(drawn.parts))] if drawn.parts else None


def zero_shot(clip: Clip, scenes: int, seed: int, nuisance: float) -> dict:
    """How well bare class names name crops of unseen scenes, by kind of box.

    Args:
        clip: any CLIP.
        scenes: drawn images to measure on.
        seed: of the split "clip"; another one than the training's.
        nuisance: of the scenes.

    Returns:
        For each of `KINDS`: `accuracy` over all classes, `cosine` with the own class's name, and
        `per_class` accuracy. Kinds: the true box; half of it; twice it; one part; its cluster.
    """
    names = F.normalize(clip.encode_texts(list(CLASSES)), dim=1)
    found: dict[str, list[tuple[np.ndarray, int]]] = {kind: [] for kind in KINDS}
    for index in range(scenes):
        rng = scene_rng(seed, "clip", index)
        scene = compose_scene(rng, nuisance=nuisance)
        image = Image.fromarray(scene.image)
        for drawn, kind in product(scene.objects, KINDS):
            box = _kind_box(rng, scene, drawn, kind)
            if box is not None and _usable(box):
                pixels = crop(image, box, clip.image_size)
                found[kind].append((pixels, CLASSES.index(drawn.name)))
    return {kind: _score(clip, names, pairs) for kind, pairs in found.items() if pairs}


def _score(clip: Clip, names: Tensor, pairs: list[tuple[np.ndarray, int]]) -> dict:
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in pairs])).permute(0, 3, 1, 2)
    truth = torch.tensor([class_index for _, class_index in pairs], device=names.device)
    cosines = F.normalize(clip.encode_crops(pixels), dim=1) @ names.T
    right = (cosines.argmax(1) == truth).double()
    per_class = {
        name: round(float(right[truth == position].mean()), 3)
        for position, name in enumerate(CLASSES)
        if (truth == position).any()
    }
    return {
        "crops": len(pairs),
        "accuracy": round(float(right.mean()), 4),
        "cosine": round(float(cosines.gather(1, truth[:, None]).mean()), 4),
        "per_class": per_class,
    }


# --------------------------------------------------------------------------------- the stage


def train_small_clip(output_dir: Path, settings: SmallClip) -> dict:
    """Train the small CLIP and write it as four files.

    Args:
        output_dir: gets `architecture.json`, `weights.safetensors`, `vocabulary.txt.gz` (which
            `load_clip` reads) and `record.json` (settings, versions, loss, zero-shot accuracy).
        settings: same settings, machine and number of threads, same files.

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
    model = _initial_model(config, settings.seed)
    losses = train(model, tokenizer, crops, settings)
    _write_weights(output_dir / "weights.safetensors", model)
    minutes = (time.monotonic() - started) / 60
    source = SimpleNamespace(
        architecture=str(output_dir / "architecture.json"),
        weights=output_dir / "weights.safetensors",
        vocabulary=vocabulary,
        pretrained=None,
    )
    clip = load_clip(source)
    record = {
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
    for (strength, found), kind in product(record["zero_shot"].items(), KINDS):
        accuracy, cosine = found[kind]["accuracy"], found[kind]["cosine"]
        say(f"{strength}, {kind}: accuracy {accuracy:.3f}, cosine {cosine:.3f}")
    return record


def _write_document(path: Path, content: dict) -> None:
    """Json for people to read: indented, in the order given."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
