"""Snakemake's benchmark files of a run: seconds and memory of each job."""

from pathlib import Path
from typing import Any

from lpovod.exceptions import LpovodError

NO_NUMBER = ("-", "NA", "")  # Snakemake's benchmark of a job that was too short to measure


def stage_times(folder: Path) -> list[dict[str, Any]]:
    """Rule, jobs, seconds in total and largest memory (MiB), the longest first.

    Raises:
        LpovodError: naming a file that is no benchmark of Snakemake's.
    """
    stages: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*.tsv")):
        rule = path.relative_to(folder).parts[0].removesuffix(".tsv")
        stage = stages.setdefault(rule, {"rule": rule, "jobs": 0, "seconds": 0.0, "peak": None})
        for seconds, peak in _read_benchmark(path):
            stage["jobs"] += 1
            stage["seconds"] += seconds or 0.0
            if peak is not None:
                stage["peak"] = max(peak, stage["peak"] or 0.0)
    ran = [stage for stage in stages.values() if stage["jobs"]]
    return sorted(ran, key=lambda stage: (-stage["seconds"], stage["rule"]))


def _read_benchmark(path: Path) -> list[tuple[float | None, float | None]]:
    header, *lines = path.read_text().splitlines() or [""]
    columns = header.split("\t")
    try:
        rows = [dict(zip(columns, line.split("\t"), strict=True)) for line in lines if line]
        return [(_value(row["s"]), _value(row["max_rss"])) for row in rows]
    except (KeyError, ValueError) as error:
        raise LpovodError(
            f"{path} is no benchmark file of Snakemake's ({error}). Remove it"
        ) from None


def _value(text: str) -> float | None:
    return None if text in NO_NUMBER else float(text)
