"""What a package index shows of the project, and the documentation in the wheel.

The project's address is `url` under [tool.hatch.metadata.hooks.custom] in pyproject.toml, such as that of a repository
on GitHub. Where it is empty, a link of the README to a page of docs/ becomes the command that prints that page, any
other link into the repository becomes its text, and a picture is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
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
    """Puts the pages that `prefect-crew docs` prints into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the files. An editable install reads them where they are."""
        if version == "editable":
            return
        root = Path(self.root)
        # By their names: a folder would take along what is not in the repository.
        for path in (root / "docs").rglob("*.md"):
            if path.name == "internals.md":  # for developers, who have the repository
                continue
            build_data["force_include"][str(path)] = f"prefect_crew/{path.relative_to(root).as_posix()}"
        for name in ("CHANGELOG.md",):  # a page includes it
            build_data["force_include"][str(root / name)] = f"prefect_crew/{name}"
