"""The metadata that depends on the project's address: links of the README as a package index shows it, and URLs.

The address is `url` under [tool.hatch.metadata.hooks.custom] in pyproject.toml, such as that of a repository on GitHub.
Where it is empty, a link into the repository becomes its text, and a picture is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
        if not url:
            return "" if picture else shown
        return f"{picture}[{shown}]({url.rstrip('/')}/{'raw' if picture else 'blob'}/v{version}/{target})"

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
        metadata["urls"] = {"Repository": url, "Changelog": changelog, "Issues": issues} if url else {}
