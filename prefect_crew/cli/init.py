"""`prefect-crew init`: a project to start from."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prefect_crew.cli import _output
from prefect_crew.exceptions import ConfigurationError

NOT_COPIED = ("__pycache__", ".env", ".venv", ".pytest_cache", "results")
"""What somebody who has tried the project in a clone of the repository leaves in it: secrets among it."""


def init(folder: Annotated[Path, Parameter(name="DIR", help="A folder that is empty, or not there yet.")], /) -> None:
    """Write a project to start from: a scheduled crew, a pipeline and a batch for a crew worker, with a test."""
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ConfigurationError(f"{folder} is not an empty folder: nothing was written. Give the name of a new one.")
    for source, target in _sources():
        shutil.copytree(source, folder / target, ignore=shutil.ignore_patterns(*NOT_COPIED), dirs_exist_ok=True)
    readme = folder / "README.md"  # the repository's tests are told by comments how to run its blocks
    readme.write_text(re.sub(r"<!-- .*? -->\n", "", readme.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "requirements.txt").write_text(f"prefect-crew=={version('prefect-crew')}\npytest\n", encoding="utf-8")
    _output.put(f"Wrote a project to {folder}. Start with its README.md.")


def _sources() -> list[tuple[Path, str]]:
    """Return the folders that a project is made of, and where in it they go."""
    package = Path(__file__).parents[1]
    if (starter := package / "starter").is_dir():
        return [(starter, "")]
    repository = package.parent  # an editable install: pyproject.toml has the same two folders for the wheel
    return [(repository / "deployments" / "starter", ""), (repository / "flows" / "crews", "crews")]
