"""Stage `text_embeddings`: a unit vector for each class name, keyed by the name.

All classes are embedded at once, and each vector is kept in a store under what shaped it: a class
that is added costs one name.
"""

from pathlib import Path

import numpy as np

from lpovod.artifacts import identity, sha256, write_tensors
from lpovod.clip import as_class_embeddings, embed_texts, load_clip, texts_of
from lpovod.config import ClassSettings, ClipSettings, TextEmbeddingsSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.class_embeddings import STAGE, ClassEmbeddings, clip_architecture
from lpovod.formats.store import Store, key_of
from lpovod.importers.text_rows import check_rows, read_rows
from lpovod.progress import log


def embed_classes(
    classes: ClassSettings,
    clip: ClipSettings,
    settings: TextEmbeddingsSettings,
    base: Path,
    novel: Path,
    store: Path,
    code: str,
) -> None:
    """Embed the class names and write ``{name: (D,) float32}`` with its identity, for each split.

    The vectors are CLIP's embeddings of the names, or rows of `settings.file`.

    Args:
        classes: names, and the texts that CLIP reads in place of some.
        clip: the model.
        settings: templates, or the file of imported rows.
        base: output of the base classes.
        novel: output of the novel classes.
        store: folder of the vectors made so far.
        code: digest of the source code; a vector made by different code is made again.

    Raises:
        LpovodError: if the CLIP model cannot be loaded, or the file's rows do not fit the classes.
    """
    names = [*classes.base, *classes.novel]
    inputs: dict[str, Path | str] = {}
    if settings.file is None or settings.classes is None:
        embedded = embed_names(names, classes.prompts, clip, settings, store, code)
    else:
        embedded = _embeddings_of_file(names, clip, settings.file, settings.classes)
        inputs |= {"file": settings.file, "classes": settings.classes}
        log.info(f"{len(names)} classes: rows of {settings.file}")
    inputs |= {
        "clip_weights": embedded.clip_weights,
        "clip_architecture": embedded.clip_architecture,
    }
    if clip.weights is not None and clip.vocabulary is not None:
        inputs["vocabulary"] = clip.vocabulary
    ident = identity(STAGE, settings, **inputs) | {"logit_scale": embedded.logit_scale}
    vectors = dict(zip(names, embedded.vectors, strict=True))
    for output, of_split in ((base, classes.base), (novel, classes.novel)):
        write_tensors(output, {name: vectors[name] for name in of_split}, ident)


def embed_names(
    names: list[str],
    prompts: dict[str, str],
    clip: ClipSettings,
    settings: TextEmbeddingsSettings,
    store: Path,
    code: str,
) -> ClassEmbeddings:
    """CLIP's embeddings of class names; only those that the store lacks are made.

    Args:
        names: the classes.
        prompts: by name, the text to embed in place of the name in the templates.
        clip: the model.
        settings: the templates.
        store: folder of the vectors made so far.
        code: digest of the source code.
    """
    assert clip.weights is not None, "names are embedded by a CLIP"
    architecture = clip_architecture(clip)
    weights = sha256(clip.weights)
    if isinstance(architecture, Path):
        architecture = sha256(architecture)
    shape = {
        "code": code,
        "weights": weights,
        "architecture": architecture,
        "vocabulary": sha256(clip.vocabulary) if clip.vocabulary else None,
        "pretrained": clip.pretrained,
    }
    kept = Store(store, STAGE)
    keys = {name: key_of(texts=texts_of(name, settings, prompts), **shape) for name in names}
    vectors = {name: made for name, key in keys.items() if (made := kept.tensors(key))}
    missing = [name for name in names if name not in vectors]
    log.info(f"{len(names)} classes: {len(missing)} to embed")
    if missing:
        embedded = embed_texts(missing, clip, settings, prompts)
        ident = identity(STAGE, settings) | {"logit_scale": embedded.logit_scale}
        for name, vector in zip(missing, embedded.vectors, strict=True):
            kept.put_tensors(keys[name], {"vector": vector}, ident)
            vectors[name] = ({"vector": vector}, ident)
    (_, ident) = vectors[names[0]]
    return ClassEmbeddings(
        names,
        np.stack([vectors[name][0]["vector"] for name in names]),
        ident["logit_scale"],
        weights,
        architecture,
    )


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
