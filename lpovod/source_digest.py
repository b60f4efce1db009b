"""Digest of the meaning of a program: its code and all modules it imports, without comments.

A stage becomes stale when the meaning of its code changes, not its bytes: a new comment or
docstring, other line breaks or a touched file change nothing. The modules are derived from the
imports, so nobody maintains a list. The workflow calls this while it builds its graph, so nothing
heavy is imported.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGES = ("lpovod", "workflow_scripts")

NEUTRAL = frozenset(
    {
        "lpovod.progress",  # shapes only the printed lines
        "lpovod.exceptions",  # shapes only error messages
        "lpovod.devices",  # shapes where a job computes, which is a setting of its own
        "lpovod.catalogue",  # addresses; rules pass the digests as params
        "lpovod.config",  # rules pass the values of the settings as params
        "workflow_scripts",  # turns a command line into a call
    }
)
"""Modules that shape no result; their own imports are not followed."""


def source_digest(script: Path, root: Path = Path()) -> str:
    """Digest of the meaning of a program and of every project module that it imports.

    Args:
        script: the program, relative to `root`.
        root: the project's folder.
    """
    meanings = sorted(f"{path} {_meaning(root / path)}" for path in source_files(script, root))
    return hashlib.sha256("\n".join(meanings).encode()).hexdigest()[:16]


def source_files(script: Path, root: Path = Path()) -> set[Path]:
    """The files that `source_digest` covers, relative to `root`."""
    files: set[Path] = set()
    waiting = [Path(script)]
    while waiting:
        path = waiting.pop()
        if path not in files:
            files.add(path)
            waiting += [file for file in _imports(root / path, root) if file not in files]
    return files


def _imports(path: Path, root: Path) -> list[Path]:
    names = [n for n in _read(path, path.stat().st_mtime_ns)[0] if n not in NEUTRAL]
    return [file for name in names if (file := _file(name, root)) is not None]


def _meaning(path: Path) -> str:
    return _read(path, path.stat().st_mtime_ns)[1]


@cache
def _read(path: Path, mtime: int) -> tuple[list[str], str]:
    """The project modules that a file imports, and the digest of its meaning; cached."""
    tree = ast.parse(path.read_text())
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A name imported from a package may be a module.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [s for s in body if not _is_docstring(s)]  # type: ignore[attr-defined]
    modules = [name for name in names if name.split(".")[0] in PACKAGES]
    return modules, hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _file(module: str, root: Path) -> Path | None:
    path = Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (root / candidate).is_file():
            return candidate
    return None


def _is_docstring(statement: ast.AST) -> bool:
    """Whether a statement is a mere string: a docstring, or the description of a constant."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
