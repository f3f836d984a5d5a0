"""What a package index shows of the project, and the documentation in the wheel.

The project's address is `url` under [tool.hatch.metadata.hooks.custom] in pyproject.toml, such as that of a repository
on GitHub. Where it is empty, a link of the README to a page of docs/ becomes the command that prints that page, any
other link into the repository becomes its text, and a picture is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def readme_for_index(text: str, url: str, version: str) -> str:
    """Return the README with links that work outside of the repository, and without comments.

    Args:
        text: The README.
        url: The project's address, or nothing.
        version: The version whose tag the links lead to.
    """

    def link(match: re.Match[str]) -> str:
        picture, shown, target = match.groups()
        if url:
            return f"{picture}[{shown}]({url.rstrip('/')}/{'raw' if picture else 'blob'}/v{version}/{target})"
        page = re.match(r"docs/(.+)\.md", "docs/changelog.md" if target == "CHANGELOG.md" else target)
        return "" if picture else f"{shown} (`prefect-crew docs {page[1]}`)" if page else shown

    return RELATIVE.sub(link, re.sub(r"^<!--.*?-->\n", "", text, flags=re.MULTILINE))


class CustomMetadataHook(MetadataHookInterface):
    """Fills in `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add to the metadata of the project."""
        url = str(self.config["url"])
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": readme_for_index(text, url, str(metadata["version"])),
        }
        changelog = f"{url.rstrip('/')}/blob/v{metadata['version']}/CHANGELOG.md"
        issues = f"{url.rstrip('/')}/issues"
        documentation = f"{url.rstrip('/')}/tree/v{metadata['version']}/docs"
        addresses = {"Repository": url, "Documentation": documentation, "Changelog": changelog, "Issues": issues}
        metadata["urls"] = addresses if url else {}


class CustomBuildHook(BuildHookInterface):  # pyright: ignore[reportMissingTypeArgument]
    """Puts the pages that `prefect-crew docs` prints into the wheel, as it prints them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the files. In an editable install the command makes them itself."""
        if version == "editable":
            return
        finished = run_path(str(Path(self.root) / "docs" / "printed.py"))
        self.folder = TemporaryDirectory()  # until the files are in the wheel
        for name in finished["pages"]():
            file = Path(self.folder.name, f"{name}.md")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(finished["printed"](name), encoding="utf-8")
            build_data["force_include"][str(file)] = f"prefect_crew/docs/{name}.md"
