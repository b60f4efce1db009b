"""Stage `text_embeddings`: a unit vector for each class name, keyed by the name."""

from pathlib import Path

import numpy as np

from lpovod.artifacts import identity, write_tensors
from lpovod.clip import as_class_embeddings, embed_texts, load_clip
from lpovod.config import ClipSettings, TextEmbeddingsSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.class_embeddings import STAGE, ClassEmbeddings
from lpovod.importers.text_rows import check_rows, read_rows
from lpovod.progress import log


def embed_classes(
    names: list[str],
    clip: ClipSettings,
    settings: TextEmbeddingsSettings,
    output: Path,
    prompts: dict[str, str] | None = None,
) -> None:
    """Embed class names and write ``{name: (D,) float32}`` with its identity.

    The vectors are CLIP's embeddings of the names, or rows of `settings.file`.

    Args:
        names: the classes.
        clip: the model.
        settings: templates, or the file of imported rows.
        output: safetensors.
        prompts: by name, the words that take its place in the templates.

    Raises:
        LpovodError: if the CLIP model cannot be loaded, or the file's rows do not fit the classes.
    """
    inputs: dict[str, Path | str] = {}
    if settings.file is None or settings.classes is None:
        words = [(prompts or {}).get(name, name) for name in names]
        classes, source = embed_texts(words, clip, settings), f"{len(settings.templates)} prompts"
    else:
        classes = _embeddings_of_file(names, clip, settings.file, settings.classes)
        source = str(settings.file)
        inputs |= {"file": settings.file, "classes": settings.classes}
    inputs |= {
        "clip_weights": classes.clip_weights,
        "clip_architecture": classes.clip_architecture,
    }
    if clip.weights is not None and clip.vocabulary is not None:
        inputs["vocabulary"] = clip.vocabulary
    ident = identity(STAGE, settings, **inputs) | {"logit_scale": classes.logit_scale}
    write_tensors(output, dict(zip(names, classes.vectors, strict=True)), ident)
    log.info(f"{len(names)} classes, {source}: {output}")


def _embeddings_of_file(
    names: list[str], clip: ClipSettings, file: Path, classes: Path
) -> ClassEmbeddings:
    """The rows of a file for the names, checked against CLIP's embeddings if CLIP is given."""
    rows, model = read_rows(file, classes), None
    if clip.weights is not None:
        model = load_clip(clip, "cpu")
        check_rows(file, rows, model.encode_texts(list(rows)).double().numpy())
    if absent := [name for name in names if name not in rows]:
        raise LpovodError(f"{classes} does not list the class {absent[0]!r}")
    return as_class_embeddings(names, np.stack([rows[name] for name in names]), model, clip)
