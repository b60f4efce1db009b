"""Stub."""

from pathlib import Path

from lpovod.artifacts import write_json


def check(
    train_images: Path,
    train_annotations: Path,
    bad_images: str,
    key: str,
    output: Path,
    page: Path,
    val_images: Path | None = None,
    val_annotations: Path | None = None,
) -> None:
    """Check."""
    write_json(output, {"bad_images": {}, "key": key})
    page.write_text("x")
