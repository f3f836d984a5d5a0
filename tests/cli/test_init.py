"""`prefect-crew init`: a project to start from, written into an empty folder only."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

WRITTEN = {
    *("README.md", "prefect.yaml", "topics.csv", "requirements.txt", "tests/test_deployments.py"),
    *("compose.yaml", "Dockerfile", ".env.example", ".dockerignore", ".gitignore"),
    *(f"crews/{name}.yaml" for name in ("draft", "research", "review", "write")),
}


def test_a_project_is_written(here, tmp_path: Path):
    folder = tmp_path / "new" / "project"
    done = here("init", str(folder))
    assert (done.code, done.err) == (0, "")
    assert f"Wrote a project to {folder}" in done.out
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == WRITTEN
    assert f"prefect-crew=={version('prefect-crew')}" in (folder / "requirements.txt").read_text()


def test_the_wheel_has_what_is_written_and_nothing_else():
    """Listed file by file: a folder would take along a .env that somebody has made to try the project."""
    build = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    listed = build["targets"]["wheel"]["force-include"]
    assert {target.removeprefix("prefect_crew/starter/") for target in listed.values()} == WRITTEN - {
        "requirements.txt"
    }


@pytest.mark.parametrize("kind", ["file", "folder-with-a-file"])
def test_what_is_there_is_not_touched(here, tmp_path: Path, kind: str):
    taken = tmp_path / "taken"
    if kind == "file":
        taken.write_text("mine")
    else:
        taken.mkdir()
        (taken / ".hidden").write_text("mine")
    done = here("init", str(taken))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"{taken} is not an empty folder: nothing was written.")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"taken", ".hidden"}
