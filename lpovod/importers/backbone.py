"""Pretrained weights that a training starts from: OpenMMLab's names (SoCo), torchvision's, timm's.

A ResNet-50 of torchvision differs in two ways from the original's: the stride is on the 3 x 3
convolution, which is an architecture of its own here (``resnet50_torchvision``), and images are
normalised with other means and deviations, which its first layer is converted for. Images
of a model of timm's are normalised as timm does it.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lpovod.artifacts import read_tensors
from lpovod.config import TIMM
from lpovod.exceptions import LpovodError, existing, some
from lpovod.importers.openmmlab import original_name, read_checkpoint
from lpovod.progress import log
from lpovod.views import MEAN, STD

TORCHVISION_MEAN = tuple(255 * v for v in (0.485, 0.456, 0.406))
TORCHVISION_STD = tuple(255 * v for v in (0.229, 0.224, 0.225))


def start_from(model: nn.Module, path: Path, architecture: str) -> None:
    """Fill a network, in place, with all tensors of a file that it has a place for.

    Args:
        model: with a ``backbone`` and a ``neck``.
        path: ``.safetensors`` of our proposal network, OpenMMLab's checkpoint with ``backbone.``
            and perhaps ``neck.`` and ``roi_head.``, or torchvision's ResNet state dict; for a
            model of timm's, that model's state dict as ``.safetensors`` or torch's format.
        architecture: of the backbone.

    Raises:
        LpovodError: if the backbone would stay incomplete, a shape differs, or the file is of
            another architecture.
    """
    tensors, unused = fitting_tensors(model, path, architecture)
    model.load_state_dict(tensors, strict=False)
    log.info(
        f"training starts from {len(tensors)} tensors of {path}; not used: {some(unused) or 'none'}"
    )


def fitting_tensors(
    model: nn.Module, path: Path, architecture: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file that a network has a place for; the network may be on the meta device.

    Args:
        model: as for `start_from`.
        path: as for `start_from`.
        architecture: of the backbone.

    Returns:
        tensors by the network's names, and the file's names that are not used, sorted.

    Raises:
        LpovodError: as `start_from` does.
    """
    state, unused = _read(path, architecture, model.get_submodule("backbone"))
    own = {original_name(name): tensor for name, tensor in model.state_dict().items()}
    used = {name for name in own if name in state}
    missing = [
        name
        for name in own
        if name.startswith("backbone.") and name not in state and "num_batches" not in name
    ]
    if missing:
        raise LpovodError(f"{path} lacks {some(missing)} of the backbone {architecture}")
    wrong = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(used)
        if state[name].shape != own[name].shape
    ]
    if wrong:
        raise LpovodError(f"{path} does not fit the settings of backbone: {some(wrong)}")
    ours = {
        name: state[original_name(name)]
        for name in model.state_dict()
        if original_name(name) in used
    }
    return ours, sorted([*(state.keys() - used), *unused])


def _read(
    path: Path, architecture: str, backbone: nn.Module
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the model's or the original's names, and names of timm's file left unused."""
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as file:
            is_timm_s = architecture.startswith(TIMM) and "identity" not in (file.metadata() or {})
            if not is_timm_s:
                return _read_network(path, architecture), []
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not state:
            raise LpovodError(f"{path} has no tensors")
    elif architecture.startswith(TIMM):
        state, _ = read_checkpoint(path)
    else:
        return _read_original(path, architecture), []
    # Imported with timm only where there is a model of timm's.
    from lpovod.networks.timm_backbone import TimmBackbone

    assert isinstance(backbone, TimmBackbone)
    tensors, unused = backbone.from_checkpoint(state, path)
    return {f"backbone.{name}": tensor for name, tensor in tensors.items()}, unused


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(existing(path), framework="pt")
    except SafetensorError as error:
        raise LpovodError(f"{path} is not a whole safetensors file ({error})") from None


def _read_network(path: Path, architecture: str) -> dict[str, Tensor]:
    tensors, ident = read_tensors(path, "proposals")
    trained = ident.get("backbone", {}).get("architecture", architecture)
    # Names and shapes may be the same where strides or the normalisation of images are not.
    if trained != architecture:
        raise LpovodError(
            f"{path} was trained with backbone.architecture {trained}, expected {architecture}"
        )
    return {
        k: torch.from_numpy(v) for k, v in tensors.items() if k.startswith(("backbone.", "neck."))
    }


def _read_original(path: Path, architecture: str) -> dict[str, Tensor]:
    state, _ = read_checkpoint(path)
    if any(name.startswith("backbone.") for name in state):
        return state
    if "conv1.weight" not in state:
        raise LpovodError(
            f"{path} has neither OpenMMLab's names (backbone.conv1.weight) nor torchvision's "
            f"(conv1.weight), but {some(sorted(state))}"
        )
    if architecture != "resnet50_torchvision":
        raise LpovodError(
            f"{path} has torchvision's names. Its stride is on the 3 x 3 convolutions, that of "
            f"{architecture} is not, and its weights would mean something else there: set "
            "backbone.architecture to resnet50_torchvision"
        )
    return {f"backbone.{k}": v for k, v in _for_our_images(state).items()}


def _for_our_images(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first convolution and norm, for images normalised as here instead of torchvision's.

    ``(v - m) / s = (v - M) / S · S / s + (M - m) / s``: the factor goes into the kernel, the shift
    of its sum into the norm's mean. Equal except at the border, where zeros stand for the mean.
    """
    mean, std, their_mean, their_std = (
        torch.tensor(v, dtype=torch.float64) for v in (MEAN, STD, TORCHVISION_MEAN, TORCHVISION_STD)
    )
    kernel = state["conv1.weight"].double()
    shift = (kernel.sum(dim=(2, 3)) * (mean - their_mean) / their_std).sum(dim=1)
    return state | {
        "conv1.weight": (kernel * (std / their_std).view(3, 1, 1)).float(),
        "bn1.running_mean": (state["bn1.running_mean"].double() - shift).float(),
    }
