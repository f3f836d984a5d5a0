"""Escape text for Markdown, so that Prefect's page renders any text of a crew as text. Pure.

Prefect's interfaces render Markdown with their own sanitiser; this module does not rely on it. It escapes text from
outside that would become markup, and cuts it: a command shows the whole text.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from prefect_crew._text import TURNS
from prefect_crew.client.models import CrewStatus

OUTPUT_CAP = 60_000
"""The most characters of a result in an artifact; Prefect Cloud refuses bodies over 5 MiB."""
CELL_CAP = 300
# The two overrides among the characters that change the direction: they show letters in a wrong order, and no honest
# text needs them.
_OVERRIDES = {code: TURNS[code] for code in (0x202D, 0x202E)}


def cell(text: str, cap: int = CELL_CAP) -> str:
    """Return text as one table cell: on one line, cut to `cap`, with markup escaped."""
    flat = " ".join(text.split())
    return prose(flat if len(flat) <= cap else f"{flat[:cap]}…").replace("|", "\\|")


def prose(text: str) -> str:
    """Return text as part of a line, without markup."""
    escaped = html.escape(" ".join(text.split()).translate(TURNS), quote=False)
    return re.sub(r"([\\`*_\[\]~#!$])", r"\\\1", escaped)


def code(text: str) -> str:
    """Return text as inline code, also text with backticks."""
    flat = " ".join(text.split()).translate(TURNS).replace("|", "¦")
    fence = "`" * (_longest_run(flat) + 1)
    pad = " " if "`" in flat else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)


LINE = 60
"""Characters of a line of code that fit Prefect's page in a window of 1280 pixels."""


def fenced(text: str) -> str:
    """Return text as a block of code, cut to `OUTPUT_CAP`. The page does not break long lines."""
    content = text if len(text) <= OUTPUT_CAP else f"{text[:OUTPUT_CAP]}…"
    whole: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    lines = (textwrap.wrap(line, LINE, **whole) for line in content.split("\n"))
    content = "\n".join("\n".join(parts) for parts in lines)
    fence = "`" * max(3, _longest_run(content) + 1)
    return f"{fence}text\n{content.translate(TURNS)}\n{fence}"


def commands(*lines: str) -> str:
    """Return commands as a block that people can copy. A line is never broken, and begins with its command."""
    return "\n".join(["```bash", *(" ".join(line.splitlines()).translate(TURNS) for line in lines), "```"])


_SAFE_IN_URLS = ":/?#[]@!$&'*+,;=%"


def link(text: str, url: str, cap: int = CELL_CAP) -> str:
    """Return a link for a line or a table's cell. The older interface shows backticks within a link, so it has none."""
    return f"[{cell(text, cap)}]({quote(url, safe=_SAFE_IN_URLS, errors='replace')})"


def flow_run_link(flow_run_id: str) -> str:
    """Return a link from an artifact's page to a flow run, relative since the page's address is unknown here."""
    return link(flow_run_id[:8], f"../../runs/flow-run/{flow_run_id}")


_MAY_OPEN = re.compile(r"[ \t>*+\-0-9.)]*(`{3,}|~{3,})")
_FENCE = re.compile(r"(`{3,}+)[^`|]*|(~{3,}+)[^|]*")
"""The opening of a fenced block of code at the margin. Some renderers take a line with a bar for a table's head."""
# Every pattern here is linear or bounded: a crew's text may repeat any character many times.
_TAG_OR_IMAGE = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)")
_LOOK = 300
"""Characters of a link's target in which its scheme must stand."""
# The target of a link or of a reference. If it is on the next line, the pattern does not see it.
_TARGET = re.compile(rf"\](?P<mark>[(:])(?=\s{{0,20}}(?P<target>[^\s)]{{0,{_LOOK + 1}}}))")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(:?)")


def reading(text: str) -> str:
    """Return a crew's Markdown for reading: its formatting stays, its HTML shows as text, its images as links.

    The page loads nothing from other servers when somebody opens it, and runs nothing when somebody clicks. A link that
    is neither http, https nor mailto shows as text. Fenced code without indentation stays unchanged until a fence
    appears in a list or a quotation. From there on, the function cannot know which lines are code.
    """
    tamed: list[str] = []
    fence, is_sure = "", True
    for line in text.translate(_OVERRIDES).splitlines():
        if fence:
            tamed.append(line)
            if re.fullmatch(rf" {{0,3}}{fence[0]}{{{len(fence)},}}[ \t]*", line):
                fence = ""
        elif is_sure and (opening := _FENCE.fullmatch(line)):
            tamed.append(line)
            fence = opening[1] or opening[2]
        else:
            is_sure = is_sure and not _MAY_OPEN.match(line)
            # An invisible word joiner after a `<` or `!` makes it text. In inline code, an entity would be visible.
            tamed.append(_TARGET.sub(_led_to, _TAG_OR_IMAGE.sub("\\g<0>\u2060", line)))
    return "\n".join([*tamed, fence] if fence else tamed)


def _led_to(link: re.Match[str]) -> str:
    return link[0] if _is_harmless(link["target"]) else f"]\\{link['mark']}"


def _is_harmless(target: str) -> bool:
    """Return whether a link leads to a page or a mail address. If its start does not show that, return False."""
    is_cut = len(target) > _LOOK
    if is_cut:
        entity = target.rfind("&")
        if entity >= 0 and ";" not in target[entity:]:
            target = target[:entity]  # half an entity would be another character
    # As a renderer reads it: without escapes, entities, and characters before the scheme.
    target = re.sub(r"[\x00-\x20\\<\u2060]", "", html.unescape(target))
    scheme = _SCHEME.match(target)
    if scheme is None:
        return bool(target)
    if scheme[2]:
        return scheme[1].lower() in ("http", "https", "mailto")
    return not is_cut or scheme.end() < len(target)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are Markdown already."""
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return seconds as text for people, such as `2 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def progress(status: CrewStatus) -> str:
    """Return the progress in a status for the end of a line, "" if the status has none."""
    if status.total_tasks:
        return f" ({status.completed_tasks or 0} of {status.total_tasks} tasks done)"
    if status.completed_tasks is not None:  # a hosted Flow counts its steps, and does not say how many there are
        return f" ({status.completed_tasks} steps done)"
    return f" ({status.progress:.0%})" if status.progress is not None else ""
