"""LP-OVOD, open-vocabulary object detection by linear probing.

The stages of the workflow, and the trained model in Python::

    model = lpovod.load("mini.safetensors")
    detections = model.detect("photograph.jpg", threshold=0.3)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Detections", "Model", "load"]


def __getattr__(name: str) -> Any:
    """The model's names, on first use: they need torch, and most stages do not."""
    if name in __all__:
        return getattr(import_module("lpovod.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
