"""Backbones of timm: any of its models that gives feature maps at strides 4, 8, 16 and 32.

`networks.backbone` imports this module for these alone. Nothing is downloaded: weights come from a
file (`lpovod.importers.backbone`) or are drawn as timm draws them.
"""

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d, DropPath
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lpovod.config import TIMM
from lpovod.distributed import BatchNorm2d
from lpovod.exceptions import LpovodError
from lpovod.views import Normalisation

STRIDES = (4, 8, 16, 32)
PROBE = (64, 96)
"""Height and width that no model was made for."""
MARK = -10_000
"""Far below every number that timm initialises anything with."""


class SharedBatchNormAct2d(BatchNorm2d):
    """timm's norm with an activation, with the statistics of all ranks."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


SHARED = {nn.BatchNorm2d: BatchNorm2d, BatchNormAct2d: SharedBatchNormAct2d}


class TimmBackbone(nn.Module):
    """Feature maps C2 ... C5 at strides 4 ... 32, (n, channels, H, W) each.

    Dropout and stochastic depth are off: what they draw would differ between one rank and several.

    Attributes:
        outputs: channels of C2 ... C5.
        normalisation: of the images that timm's weights of this name expect.

    Raises:
        LpovodError: if timm has no model of that name, or it has no such maps, needs images of one
            size, or has norms whose statistics ranks cannot share.
    """

    def __init__(self, architecture: str):
        super().__init__()
        self.architecture = architecture
        self.name = architecture.removeprefix(TIMM)
        _check_name(self.name)
        try:
            self._build()
        except LpovodError:
            raise
        except Exception as error:  # each family has its own way to refuse
            self._build_for_any_size(error)
        share_statistics(self.net)
        _leave_nothing_to_chance(self.net)
        cfg = self.net.pretrained_cfg
        mean, std = (tuple(255 * v for v in cfg[key]) for key in ("mean", "std"))
        self.normalisation = Normalisation(mean, std)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.net(images)
        maps = [maps[place] for place in self.places]
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last else maps

    def _build_for_any_size(self, error: Exception) -> None:
        """Swin's attention masks are of one size, unless an option is set that few models have."""
        try:
            self._build(dynamic_img_size=True)
        except Exception:
            raise LpovodError(
                f"{self.architecture} cannot be a backbone: {_first_line(error)}. Choose a model "
                "that gives feature maps (timm's features_only) of images of any size"
            ) from None

    def _build(self, **options: Any) -> None:
        self.options = options
        self.net = timm.create_model(self.name, features_only=True, **options)
        strides = self.net.feature_info.reduction()
        if not set(STRIDES) <= set(strides):
            raise LpovodError(
                f"{self.architecture} has feature maps at strides {', '.join(map(str, strides))}; "
                f"a backbone needs {', '.join(map(str, STRIDES))}. Choose a convolutional or "
                "hierarchical model, such as timm:resnet18 or timm:convnext_tiny"
            )
        self.places = [strides.index(stride) for stride in STRIDES]
        self.outputs = [self.net.feature_info.channels()[place] for place in self.places]
        self.channels_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        self._check_maps()

    @torch.no_grad()
    def _check_maps(self) -> None:
        self.eval()
        maps = self(next(self.net.parameters()).new_zeros(1, 3, *PROBE))
        self.train()
        sizes = [tuple(features.shape[1:]) for features in maps]
        expected = [
            (channels, PROBE[0] // stride, PROBE[1] // stride)
            for channels, stride in zip(self.outputs, STRIDES, strict=True)
        ]
        if sizes != expected:
            raise RuntimeError(f"its maps are of {sizes}, not of {expected}")

    def from_checkpoint(
        self, state: dict[str, Tensor], path: Path
    ) -> tuple[dict[str, Tensor], list[str]]:
        """A checkpoint of this model, by the names of this module.

        timm itself renames old names and loads, into a second network. A third one, loaded with a
        constant of its own in place of each tensor, shows which tensor went where.

        Args:
            state: timm's names and tensors, of the whole model: heads are left out.
            path: for the message.

        Returns:
            those tensors of `state_dict` that the checkpoint has, and the checkpoint's names that
            nothing was made of.

        Raises:
            LpovodError: if a shape differs or the file is of another model.
        """
        names = list(state)
        marked = {n: torch.full(state[n].shape, float(MARK - i)) for i, n in enumerate(names)}
        marks = self._loaded(marked, path)
        # A tensor may be made of several, such as a query and a key, one behind the other.
        values = {name: marks[name].double().unique_consecutive() for name in marks}
        filled = [name for name in values if values[name].min() < MARK / 100]
        found = {round(MARK - v) for name in filled for v in values[name].tolist()}
        loaded = self._loaded(state, path)
        unused = [name for number, name in enumerate(names) if number not in found]
        return {f"net.{name}": loaded[name] for name in filled}, unused

    def _loaded(self, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        # Given a state dict timm looks nowhere else; without the addresses it could not.
        source = {"state_dict": state, "file": None, "url": "", "hf_hub_id": None}
        try:
            net = timm.create_model(
                self.name,
                pretrained=True,
                features_only=True,
                pretrained_cfg_overlay=source,
                **self.options,
            )
        except Exception as error:  # a family's renaming can fail at whatever it does not expect
            reason = " ".join(str(error).split())
            raise LpovodError(f"{path} does not fit {self.architecture}: {reason}") from None
        return net.state_dict()


def _check_name(name: str) -> None:
    if timm.is_model(name):
        known = list(timm.models.get_arch_pretrained_cfgs(name))
        valid = "." not in name or name in known
    else:
        known, valid = timm.list_models(), False
    if not valid:
        near = [f"{TIMM}{n}" for n in difflib.get_close_matches(name, known, 3)]
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names them"
        raise LpovodError(f"backbone.architecture: timm has no model {name!r}; {hint}")


def share_statistics(net: nn.Module) -> None:
    """Turn the batch norms of a model of timm's, in place, into those that ranks share.

    Raises:
        LpovodError: if a norm has running statistics and is neither torch's nor timm's.
    """
    for module in net.modules():
        if type(module) in SHARED:
            # The same object with the same tensors: hooks and second references stay.
            module.__class__ = SHARED[type(module)]
        elif getattr(module, "running_var", None) is not None:
            raise LpovodError(
                f"backbone.architecture: this model of timm's has norms ({type(module).__name__}) "
                "whose statistics several ranks cannot share; choose another"
            )


def _leave_nothing_to_chance(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, _DropoutNd):
            module.p = 0.0


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
