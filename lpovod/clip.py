"""One loader for every CLIP: OpenAI's archive, LAION's checkpoints and the small one shipped here.

All use open_clip's classes, so an architecture is either a name that open_clip knows or a json file
in its format. Weights are checked against it key by key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from tempfile import NamedTemporaryFile
from typing import Protocol

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP, CLIPVisionCfg, CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import ConvNormAct
from timm.models import build_model_with_cfg, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lpovod.artifacts import read_json, sha256
from lpovod.catalogue import FILES, OPENAI_SAFETENSORS
from lpovod.config import INTERPOLATIONS, RESIZE_MODES, ClipSettings, TextEmbeddingsSettings
from lpovod.exceptions import LpovodError, existing, some, why_unreadable
from lpovod.formats.class_embeddings import ClassEmbeddings, clip_architecture
from lpovod.importers.torchscript import is_torchscript, read_torchscript
from lpovod.networks.meta import on_meta
from lpovod.precision import computing_in
from lpovod.progress import progress
from lpovod.transfers import numbers

# Crops per forward pass, however many a caller passes. A CPU is fastest if the activations of a
# pass fit its caches; an accelerator needs many crops.
CROPS_PER_PASS = {"cpu": 32}

BATCH = 256

# OpenAI's models hold these besides parameters and buffers, and are recognised by them.
_ARCHIVE_ATTRIBUTES = ("input_resolution", "context_length", "vocab_size", "attn_mask")


class ClipSource(Protocol):
    """The files and names that define a CLIP (see `load_clip`)."""

    @property
    def architecture(self) -> str: ...
    @property
    def weights(self) -> Path | None: ...
    @property
    def vocabulary(self) -> Path | None: ...
    @property
    def pretrained(self) -> str | None: ...


@dataclass(frozen=True)
class Preprocessing:
    """How a crop becomes a CLIP's input: resized to a square, scaled to [0, 1], normalised."""

    image_size: int  # side of the square in pixels
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    interpolation: str  # one of INTERPOLATIONS
    resize_mode: str  # one of RESIZE_MODES


@register_model
def small_convnet(pretrained: bool = False, pretrained_cfg: object = None, **kwargs) -> ByobNet:
    """The small CLIP's image tower: seven 3x3 convolutions, 24-48-96-192 channels, stride 16.

    Registered with timm, where open_clip looks up an architecture's `timm_model_name`.
    """
    blocks = (
        ByoBlockCfg(type="basic", d=1, c=channels, s=2, gs=0, br=1.0) for channels in (48, 96, 192)
    )
    return build_model_with_cfg(
        ByobNet,
        "small_convnet",
        pretrained,
        pretrained_cfg={"first_conv": "stem.conv", "classifier": "head.fc"},
        model_cfg=ByoModelCfg(tuple(blocks), stem_chs=24, stem_type="3x3", stem_pool=""),
        # Blocks that start as mere 1x1 convolutions took twice as many steps to learn shapes.
        zero_init_last=False,
        **kwargs,
    )


@dataclass(frozen=True)
class Clip:
    """A CLIP ready for inference.

    The batch norms of a convolutional tower are folded into its convolutions, and the last block
    of a transformer computes only the class token (both change results by less than 1e-5), so
    `model` must be neither trained nor saved.
    """

    model: CLIP | CustomTextCLIP
    tokenizer: SimpleTokenizer
    preprocessing: Preprocessing
    logit_scale: float  # inverse temperature, already exponentiated: 100 in OpenAI's models
    dimension: int  # of the shared space
    weights_digest: str  # sha256 of the weights file

    @property
    def image_size(self) -> int:
        """Side of a crop in pixels."""
        return self.preprocessing.image_size

    @property
    def crops_per_pass(self) -> int:
        """Crops that the image tower sees at once, at most, on the model's device."""
        return CROPS_PER_PASS.get(self.model.logit_scale.device.type, BATCH)

    @torch.inference_mode()
    def encode_crops(self, pixels: Tensor) -> Tensor:
        """Image features of crops.

        Args:
            pixels: (N, 3, S, S) uint8 RGB, S = `image_size`, on any device; not normalised.

        Returns:
            (N, dimension) float32, *not* of unit norm, on the model's device.

        Raises:
            ValueError: if the dtype or the shape is different.
        """
        expected = (3, self.image_size, self.image_size)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(
                f"crops are {pixels.dtype} {tuple(pixels.shape)}; this CLIP takes torch.uint8 "
                f"(N, 3, {self.image_size}, {self.image_size}): resize them to its `image_size`"
            )
        device = self.model.logit_scale.device
        precision = next(self.model.visual.parameters()).dtype
        features = [torch.empty(0, self.dimension, device=device)]
        mean = numbers(self.preprocessing.mean, features[0]).view(3, 1, 1)
        std = numbers(self.preprocessing.std, features[0]).view(3, 1, 1)
        # The weights are of the precision that the tower computes in; nothing else lowers it.
        with computing_in("float32", device.type):
            for part in pixels.split(self.crops_per_pass) if len(pixels) else ():
                part = part.to(device).contiguous(memory_format=torch.channels_last).float()
                part = part.div_(255).sub_(mean).div_(std).to(precision)
                features.append(self.model.encode_image(part).float())
        return torch.cat(features)

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Text features, (N, dimension) float32, *not* of unit norm, on the model's device.

        Raises:
            LpovodError: if a text has more tokens than the model reads, because CLIP would silently
                drop its end.
        """
        return _encode_texts(self.model, self.tokenizer, self.dimension, texts)


def _encode_texts(
    model: CLIP | CustomTextCLIP, tokenizer: SimpleTokenizer, dimension: int, texts: list[str]
) -> Tensor:
    _check_lengths(texts, tokenizer)
    device = model.logit_scale.device
    features = [torch.empty(0, dimension, device=device)]
    for start in range(0, len(texts), BATCH):
        tokens = tokenizer(texts[start : start + BATCH]).to(device)
        features.append(model.encode_text(tokens).float())
    return torch.cat(features)


def load_clip(
    settings: ClipSource, device: str | torch.device = "cpu", precision: str = "float32"
) -> Clip:
    """Build the architecture, load the weights and prepare it for inference.

    Args:
        settings: an object with four attributes. `architecture`: a model name of open_clip
            ("ViT-B-32-quickgelu" is OpenAI's ViT-B/32), or the path of a json file in its format
            (`embed_dim`, `vision_cfg`, `text_cfg`; or `model_cfg` with those and
            `preprocess_cfg`). `weights`: safetensors, a state dict saved by `torch.save`, or
            OpenAI's TorchScript archive. `vocabulary`: gzipped BPE merges of the tokenizer; None
            for CLIP's own. `pretrained`: open_clip's tag of the weights (see `preprocessing_of`).
        device: holds the model.
        precision: of the image tower, float32 or bfloat16; the text tower computes in float32.

    Raises:
        LpovodError: if a file is missing, the architecture is unknown, a key or shape of the
            weights does not fit it, or the vocabulary has a different size; and as
            `preprocessing_of` does.
    """
    config = _read_architecture(settings.architecture)[0]
    preprocessing = preprocessing_of(settings)
    if settings.weights is None:
        raise LpovodError("clip.weights is null: name the weights of the CLIP to load")
    path = existing(settings.weights, "clip.weights")
    digest = sha256(path)
    if digest == FILES[OPENAI_SAFETENSORS].digest:
        _check_activation(path, config)
    model = _build_model(config)
    model.load_state_dict(_fitting_state(model, path, settings.architecture, config))
    model.requires_grad_(False).eval()
    _fold_batch_norms(model.visual)
    _keep_class_token(model.visual)
    model.visual.to(getattr(torch, precision))
    return Clip(
        model=model.to(device=device, memory_format=torch.channels_last),
        tokenizer=_load_tokenizer(settings.vocabulary, config, model.vocab_size),
        preprocessing=preprocessing,
        logit_scale=float(model.logit_scale.exp()),
        dimension=int(config["embed_dim"]),
        weights_digest=digest,
    )


def check_clip(settings: ClipSource, texts: Sequence[str] = ()) -> int:
    """Refuse what `load_clip` would refuse, without memory for the model; no forward pass.

    Weights that are missing, because they are downloaded later, are not compared.

    Args:
        settings: as for `load_clip`.
        texts: that are going to be embedded.

    Returns:
        dimension of the space that images and texts share.

    Raises:
        LpovodError: as `load_clip` does, and if a text is too long.
    """
    config = _read_architecture(settings.architecture)[0]
    preprocessing_of(settings)
    model = on_meta(lambda: _build_model(config))
    if settings.weights is not None and settings.weights.is_file():
        _fitting_state(model, settings.weights, settings.architecture, config)
    _check_lengths(texts, _load_tokenizer(settings.vocabulary, config, model.vocab_size))
    return int(config["embed_dim"])


def build_image_tower(architecture: str) -> nn.Module:
    """The image tower of an architecture, with random weights, which counting its work needs.

    Args:
        architecture: as for `load_clip`.

    Returns:
        a module from (N, 3, S, S) float pixels to (N, dimension); S is its ``image_size``.

    Raises:
        LpovodError: an unknown or unsupported architecture.
    """
    return _build_model(_read_architecture(architecture)[0]).visual


def preprocessing_of(settings: ClipSource) -> Preprocessing:
    """The preprocessing that the weights were trained with; the weights are not needed.

    A json file states it in `preprocess_cfg`. For an architecture named by open_clip, it is in
    open_clip's table of weights under the tag `settings.pretrained`; the tag may be omitted if all
    weights of the architecture share their preprocessing. Values that neither source states are
    open_clip's defaults, which are OpenAI's.

    Raises:
        LpovodError: if the architecture is unknown or unsupported, the tag is unknown, the tag is
            missing although the weights of the architecture differ, the tagged weights need another
            activation, or `crops` does not implement the preprocessing.
    """
    architecture = settings.architecture
    config, stated = _read_architecture(architecture)
    if not architecture.endswith(".json"):
        _check_tag(architecture, settings.pretrained, config)
        stated = _look_up_preprocessing(architecture, settings.pretrained)
    elif settings.pretrained is not None:
        raise LpovodError(
            f"clip.pretrained = {settings.pretrained!r} is a tag of open_clip's models, and "
            f"{architecture} states its own preprocessing (preprocess_cfg): set it to null"
        )
    merged = merge_preprocess_dict(PreprocessCfg(), stated)
    _check_preprocessing(architecture, merged)
    size = config["vision_cfg"].get("image_size", CLIPVisionCfg.image_size)
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise LpovodError(f"{architecture} sees {width} x {height} pixels; crops are square")
    red, green, blue = (float(value) for value in merged["mean"])
    red_std, green_std, blue_std = (float(value) for value in merged["std"])
    return Preprocessing(
        image_size=height,
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
        interpolation=merged["interpolation"],
        resize_mode=merged["resize_mode"],
    )


def _check_tag(architecture: str, tag: str | None, config: dict) -> None:
    """Refuse a tag that open_clip does not know, or whose weights need another activation."""
    if tag is None:
        return
    if not open_clip.is_pretrained_cfg(architecture, tag):
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        near = get_close_matches(tag, tags, 3) or tags
        hint = f"did you mean {' or '.join(near)}?" if near else "it knows none: set it to null"
        raise LpovodError(
            f"clip.pretrained: open_clip knows no weights {tag!r} for {architecture}; {hint}"
        )
    entry = open_clip.get_pretrained_cfg(architecture, tag)
    if entry.get("quick_gelu") and not config.get("quick_gelu"):
        raise LpovodError(
            f"the weights {tag!r} need QuickGELU, which {architecture} lacks; without it they "
            f"would silently lose accuracy: set clip.architecture to {architecture}-quickgelu"
        )


def _look_up_preprocessing(architecture: str, tag: str | None) -> dict:
    """The preprocessing that open_clip's table has for an architecture's weights, or {}."""
    tags = open_clip.list_pretrained_tags_by_model(architecture) if tag is None else [tag]
    entries = [
        merge_preprocess_dict({}, open_clip.get_pretrained_cfg(architecture, name)) for name in tags
    ]
    if any(entry != entries[0] for entry in entries):
        raise LpovodError(
            f"clip.pretrained: the weights that open_clip knows for {architecture} differ in their "
            f"preprocessing: set it to the tag of your weights, one of {', '.join(tags)}. For "
            "other weights, set clip.architecture to a json file with model_cfg and preprocess_cfg"
        )
    return entries[0] if entries else {}


def _check_preprocessing(architecture: str, stated: dict) -> None:
    """Refuse a preprocessing that `crops` does not implement."""
    supported = {"interpolation": INTERPOLATIONS, "resize_mode": RESIZE_MODES, "mode": ["RGB"]}
    for key, values in supported.items():
        if stated[key] not in values:
            raise LpovodError(
                f"{architecture} needs a preprocessing with {key} {stated[key]!r}, which is not "
                f"supported; expected {' or '.join(values)}"
            )
    for key in ("mean", "std"):
        if not isinstance(stated[key], list | tuple) or len(stated[key]) != 3:
            raise LpovodError(
                f"{architecture}: preprocess_cfg.{key} is {stated[key]!r}, expected three numbers"
            )


def _read_architecture(architecture: str) -> tuple[dict, dict]:
    """Model config, and the preprocessing config if a json file states one."""
    if architecture.endswith(".json"):
        config, stated = _read_document(Path(architecture))
    else:
        config, stated = _look_up_model(architecture), {}
    _check_towers(architecture, config)
    return config, stated


def _look_up_model(architecture: str) -> dict:
    names = open_clip.list_models()
    if architecture not in names:
        close = get_close_matches(architecture, names, 3) or ["ViT-B-32-quickgelu"]
        raise LpovodError(
            f"open_clip knows no model named {architecture!r}; did you mean "
            f"{' or '.join(close)}? The path of a json file is allowed too"
        )
    return open_clip.get_model_config(architecture)


def _read_document(path: Path) -> tuple[dict, dict]:
    document = read_json(path)
    document = document if isinstance(document, dict) else {}
    config = document.get("model_cfg", document)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise LpovodError(f"{path} lacks {', '.join(missing)}: it is not an open_clip model config")
    return config, document.get("preprocess_cfg", {})


def _check_towers(architecture: str, config: dict) -> None:
    """Refuse models other than an image tower and a text tower with CLIP's tokenizer."""
    if "multimodal_cfg" in config:
        raise LpovodError(f"{architecture} is a captioning model (CoCa), which is not supported")
    text = config["text_cfg"]
    if tokenizer := text.get("hf_tokenizer_name") or text.get("hf_model_name"):
        raise LpovodError(
            f"{architecture} needs the tokenizer {tokenizer!r}, which is not CLIP's BPE: choose "
            "an architecture with CLIP's tokenizer"
        )


def _build_model(config: dict) -> CLIP | CustomTextCLIP:
    config = json.loads(json.dumps(config))  # a copy to edit
    # All weights come from the file; with this flag timm would download others first.
    config["vision_cfg"]["timm_model_pretrained"] = False
    return (CustomTextCLIP if config.pop("custom_text", False) else CLIP)(**config)


def _read_state_dict(path: Path, config: dict) -> dict[str, Tensor]:
    """The tensors of a weights file. No branch runs code that a file may contain."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if is_torchscript(path):
        state = read_torchscript(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise LpovodError(f"{path} holds a {type(state).__name__}, expected a state dict")
        state = state.get("state_dict", state)
    prefix = "module."  # added by DistributedDataParallel
    if state and all(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    marks = [key for key in state if key.split(".")[-1] in _ARCHIVE_ATTRIBUTES]
    if marks:
        _check_activation(path, config)
    return {key: value for key, value in state.items() if key not in marks}


def _check_activation(path: Path, config: dict) -> None:
    """Refuse OpenAI's weights in an architecture with another activation than theirs."""
    if not config.get("quick_gelu"):
        raise LpovodError(
            f"{path} is one of OpenAI's models, which need QuickGELU; without it they would "
            "silently lose accuracy: set clip.architecture to the -quickgelu variant"
        )


def _fitting_state(
    model: nn.Module, path: Path, architecture: str, config: dict
) -> dict[str, Tensor]:
    """Read the tensors, refusing a missing key, an extra key or a wrong shape."""
    try:
        state = _read_state_dict(path, config)
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise LpovodError(
            f"{path} is not a complete file of CLIP weights ({why_unreadable(path, error)}): "
            "download it again"
        ) from None
    expected = model.state_dict()
    scale = state.get("logit_scale")
    if scale is not None and scale.numel() == 1:  # () or (1,), depending on open_clip's version
        state = state | {"logit_scale": scale.reshape(expected["logit_scale"].shape)}
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing: {some(missing)}")
    if extra := sorted(state.keys() - expected.keys()):
        problems.append(f"not in this architecture: {some(extra)}")
    wrong = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    if wrong:
        problems.append(f"wrong shape: {some(wrong)}")
    if problems:
        raise LpovodError(
            f"the CLIP weights {path} do not fit the architecture {architecture}; "
            + "; ".join(problems)
            + ". Name the architecture that these weights were trained with"
        )
    return state


def _fold_batch_norms(tower: nn.Module) -> None:
    """Fold each batch norm of timm's convolutional towers into its convolution: faster on a CPU."""
    for module in tower.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = module.bn.act


class _ClassTokenBlock(nn.Module):
    """A transformer's last block, computed only for the class token, the one output in use.

    This saves ten of the twelve products per token: 7 % of ViT-B/32.
    """

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        normed = self.block.ln_1(tokens)
        token = self.block.ls_1(self.block.attention(normed[:, :1], normed, normed, attn_mask))
        token = tokens[:, :1] + token
        return token + self.block.ls_2(self.block.mlp(self.block.ln_2(token)))


def _keep_class_token(tower: nn.Module) -> None:
    if not isinstance(tower, VisionTransformer) or tower.pool_type != "tok" or tower.attn_pool:
        return
    blocks = tower.transformer.resblocks
    if type(blocks[-1]) is ResidualAttentionBlock and tower.transformer.batch_first:
        blocks[-1] = _ClassTokenBlock(blocks[-1])


def _load_tokenizer(vocabulary: Path | None, config: dict, vocabulary_size: int) -> SimpleTokenizer:
    context_length = config["text_cfg"].get("context_length", 77)
    if vocabulary is None:
        tokenizer = SimpleTokenizer(context_length=context_length)
    else:
        path = existing(vocabulary, "clip.vocabulary")
        try:
            tokenizer = SimpleTokenizer(bpe_path=str(path), context_length=context_length)
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise LpovodError(
                f"clip.vocabulary: {path} is not a whole gzipped file of merges ({error})"
            ) from None
    if tokenizer.vocab_size != vocabulary_size:
        raise LpovodError(
            f"the vocabulary {vocabulary or 'of CLIP'} has {tokenizer.vocab_size} tokens and the "
            f"CLIP embeds {vocabulary_size}: set clip.vocabulary to the merges file that the "
            "weights were trained with"
        )
    return tokenizer


def _check_lengths(texts: Sequence[str], tokenizer: SimpleTokenizer) -> None:
    limit = tokenizer.context_length - 2  # without start and end of text
    for text in texts:
        if (count := len(tokenizer.encode(text))) > limit:
            raise LpovodError(
                f"the text {text!r} has {count} tokens and this CLIP reads {limit}: shorten "
                "the class name or the prompt template"
            )


def embed_texts(
    names: list[str],
    clip: ClipSettings,
    settings: TextEmbeddingsSettings,
    prompts: dict[str, str] | None = None,
) -> ClassEmbeddings:
    """Embed names: the normalised mean of the unit vectors of all templates.

    Args:
        names: the classes.
        clip: the model.
        settings: the templates.
        prompts: by name, the text to embed in place of the name in the templates.

    Raises:
        LpovodError: if the CLIP model cannot be loaded.
    """
    model = load_clip(clip, "cpu")
    vectors = [
        name_vector(model.encode_texts, texts_of(name, settings, prompts))
        for name in progress(names, "text embeddings", "name")
    ]
    return as_class_embeddings(names, np.stack(vectors), model, clip)


def name_vector(encode: Callable[[list[str]], Tensor], texts: list[str]) -> np.ndarray:
    """The unit vector, (D,) float32, that stands for the texts of one name.

    One name at a time: the bits of a matrix product depend on its size, and a name's vector may not
    depend on the names beside it.
    """
    units = _unit(encode(texts).double().numpy())
    return _unit(units.mean(axis=0)).astype(np.float32)


@dataclass(frozen=True)
class TextTower:
    """What embeds words: half a CLIP, in plain arrays.

    Attributes:
        config: open_clip's configuration of the whole model.
        tensors: of everything but the image tower, float32.
        merges: byte-pair merges of the tokenizer, gzipped, (bytes,) uint8; empty for CLIP's.
    """

    config: dict
    tensors: dict[str, np.ndarray]
    merges: np.ndarray


def read_text_tower(settings: ClipSource) -> TextTower:
    """The text tower of a CLIP.

    Raises:
        LpovodError: as `load_clip` does.
    """
    if settings.weights is None:
        raise LpovodError("clip.weights is null: name the weights of the CLIP to load")
    config = _read_architecture(settings.architecture)[0]
    path, model = existing(settings.weights, "clip.weights"), on_meta(lambda: _build_model(config))
    state = _fitting_state(model, path, settings.architecture, config)
    tensors = {
        name: tensor.float().numpy()
        for name, tensor in state.items()
        if not name.startswith("visual.")
    }
    merges = b""
    if settings.vocabulary:
        merges = existing(settings.vocabulary, "clip.vocabulary").read_bytes()
    return TextTower(config, tensors, np.frombuffer(merges, np.uint8))


def text_encoder(tower: TextTower) -> Callable[[list[str]], Tensor]:
    """A function like `Clip.encode_texts`."""
    model = _build_model(tower.config)
    model.visual = nn.Identity()
    model.load_state_dict({name: torch.from_numpy(t) for name, t in tower.tensors.items()})
    model.requires_grad_(False).eval()
    # The tokenizer reads a file.
    with NamedTemporaryFile(suffix=".txt.gz") as file:
        file.write(tower.merges.tobytes())
        file.flush()
        merges = Path(file.name) if len(tower.merges) else None
        tokenizer = _load_tokenizer(merges, tower.config, model.vocab_size)
    encode = partial(_encode_texts, model, tokenizer, int(tower.config["embed_dim"]))
    return torch.inference_mode()(encode)


def texts_of(
    name: str, settings: TextEmbeddingsSettings, prompts: dict[str, str] | None = None
) -> list[str]:
    """The texts whose embeddings stand for a class."""
    words = (prompts or {}).get(name, name)
    return [template.format(words) for template in settings.templates]


def as_class_embeddings(
    names: list[str], vectors: np.ndarray, model: Clip | None, clip: ClipSettings
) -> ClassEmbeddings:
    """Vectors (n, D) by name, with the identity of the CLIP that made them, if there is one."""
    architecture = clip_architecture(clip) if model else "none"
    return ClassEmbeddings(
        names=names,
        vectors=vectors.astype(np.float32),
        logit_scale=float(model.logit_scale) if model else None,
        clip_weights=model.weights_digest if model else "none",
        clip_architecture=sha256(architecture) if isinstance(architecture, Path) else architecture,
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
