"""`lpovod export`: a finished run as one file that detects, and as ONNX graphs."""

import shutil
from pathlib import Path

from lpovod.artifacts import atomic
from lpovod.exceptions import LpovodError, UsageError
from lpovod.formats.model import read_model, write_model
from lpovod.progress import log

MODEL = Path("model", "model.safetensors")


def export(
    run: Path | None = None,
    model: Path | None = None,
    output: Path | None = None,
    text_tower: bool = False,
    onnx: Path | None = None,
) -> None:
    """Write a run's model as one file, and as ONNX graphs.

    The file holds both networks, the classes' weights and text embeddings, thresholds and
    preprocessing. `lpovod detect --model FILE` and `lpovod.load("FILE")` read it anywhere.

    Args:
        run: folder of a finished run: results/mini
        model: a model file, in place of a run
        output: the file to write: mini.safetensors
        text_tower: put CLIP's text tower into the file, so that it can score any words by itself
        onnx: folder for the image's graph and the vocabulary's graph
    """
    if output is None and onnx is None:
        raise UsageError("nothing to write: give --output FILE, or --onnx DIR, or both")
    path = model_path(run, model)
    if output is not None and text_tower:
        from lpovod.text_tower import with_text_tower

        write_model(output, with_text_tower(read_model(path)))
    elif output is not None:
        read_model(path)  # a copy of a damaged file would be found out elsewhere
        with atomic(output) as partial:
            shutil.copyfile(path, partial)
    if output is not None:
        log.info(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    if onnx is not None:
        from lpovod.apps.onnx_graphs import export_onnx

        export_onnx(path, onnx)


def model_path(run: Path | None, model: Path | None) -> Path:
    """The model file of a run, or the file itself.

    Raises:
        UsageError: if both or neither are given.
        LpovodError: if the run has no model.
    """
    if (run is None) == (model is None):
        raise UsageError("give a finished run (--run results/mini) or a model file (--model FILE)")
    if model is not None:
        return model
    assert run is not None
    path = run / MODEL
    if not path.is_file():
        raise LpovodError(
            f"{path}: no such file. Finish the run first: snakemake --cores all {path} (a run with "
            "imported proposals has no model: it has no network that proposes regions)"
        )
    return path
