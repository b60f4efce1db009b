"""Reads OpenMMLab's checkpoints and translates the names of their tensors.

Our detector keeps OpenMMLab's names for backbone and pyramid; its heads have different names.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpovod.exceptions import LpovodError, existing, why_unreadable

HEADS = {
    "region_head.convs": "roi_head.bbox_head.shared_convs",
    "region_head.fc": "roi_head.bbox_head.shared_fcs.0",
    "clip_head.convs": "roi_head.bbox_head.shared_convs_for_image",
    "clip_head.fc": "roi_head.bbox_head.shared_fcs_for_image.0",
    "box_refinement": "roi_head.bbox_head.fc_reg",
    "clip_projection": "roi_head.projection_for_image",
    "prototypes": "roi_head.prototype",
}
"""Our names of the heads' parts, and the original's."""
NOVEL = "roi_head.prototype_novel"
CARRIED = "rpn_head."


def original_name(name: str) -> str:
    """The original's name of one of our detector's tensors."""
    for part, original in HEADS.items():
        if name == part or name.startswith(f"{part}."):
            return original + name[len(part) :]
    return name


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint by name, and its ``meta``, or {}.

    It is read with torch's ``weights_only=True``, which builds only tensors and plain containers.

    Raises:
        LpovodError: if the file is missing, damaged, holds anything else, or has no state dict.
    """
    existing(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise LpovodError(
            f"{path} is not a checkpoint of only tensors and plain values "
            f"({why_unreadable(path, error)}); none of its code was run. Is the file complete?"
        ) from None
    content = content if isinstance(content, dict) else {}
    nested = next((content[k] for k in ("state_dict", "model") if k in content), content)
    state = {k: v for k, v in nested.items() if isinstance(v, Tensor)} if nested else {}
    if not state or len(state) != len(nested):
        raise LpovodError(f"{path} has no state dict: no names with tensors")
    return {k.removeprefix("module."): v for k, v in state.items()}, content.get("meta") or {}
