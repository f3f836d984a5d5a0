"""The documentation without a network: the pages that came with the package."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path
from typing import Annotated

from cyclopts import Parameter

from prefect_crew._text import with_guesses
from prefect_crew.cli import _output
from prefect_crew.exceptions import ConfigurationError

PACKAGE = Path(__file__).parents[1]


def docs(
    page: Annotated[str | None, Parameter(name="PAGE", help="A name from the list, such as tutorial.")] = None, /
) -> None:
    """Print a page of the documentation, or list the pages."""
    every = pages()
    if page is None:
        for name, path in every.items():
            _output.put(f"{name:<28} {path.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}")
        _output.note("prefect-crew docs PAGE prints a page, such as: prefect-crew docs tutorial")
        return
    name = page.partition("#")[0].removesuffix(".md")
    matches = [each for each in every if f"/{each}".endswith(f"/{name}")]
    if not matches:
        names = {each.rpartition("/")[2] for each in every}
        raise ConfigurationError(f"No page is named {with_guesses([name], names)}. To list them: prefect-crew docs")
    for match in matches:
        _output.put_markdown(page_text(match))


def pages() -> dict[str, Path]:
    """Return the pages by their names, the first ones to read first."""
    folder = PACKAGE / "docs"
    paths: dict[str, Path] = {
        path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.md")
    }
    paths = paths or run_path(str(_IN_CLONE))["pages"]()
    return {name: paths[name] for name in sorted(paths, key=lambda name: (name not in ("index", "tutorial"), name))}


def page_text(name: str) -> str:
    """Return the text of a page, which hatch_build.py has written into the wheel. A clone has no such file yet."""
    file = PACKAGE / "docs" / f"{name}.md"
    return file.read_text(encoding="utf-8") if file.exists() else run_path(str(_IN_CLONE))["printed"](name)


_IN_CLONE = PACKAGE.parent / "docs" / "printed.py"
