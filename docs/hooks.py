"""Changes of MkDocs to a page of docs/ before it renders it. A page can be read without them.

<!-- file: x.yaml -->        of the tests: the name of the file becomes the title of the code block
<!-- include: README.md -->  a file of the repository, without its title
[x](../../benchmarks/y.md)   a file of the repository that is no page: the site has its name in place of the link
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from printed import with_files, without_links_outside

# First: Prefect parses the docstrings of flows with griffe, whose warnings mkdocstrings counts as soon as it is loaded.
import prefect_crew.operations  # noqa: F401

ROOT = Path(__file__).parents[1]


def on_config(config: Any) -> Any:
    """Link the repository, where pyproject.toml names one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    config.repo_url = project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["url"] or None
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text as MkDocs renders it."""
    markdown = without_links_outside(with_files(markdown), page.file.src_uri.removesuffix(".md"))
    markdown = re.sub(r"^<!-- file: (\S+) -->\n```(\w+)$", r'```\2 title="\1"', markdown, flags=re.MULTILINE)
    return re.sub(r"^<!-- (?:page|run|output|not run)\b.*?-->\n", "", markdown, flags=re.MULTILINE)
