"""Text for messages: made safe for terminals and logs, and kept short."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

TURNS = {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
"""Characters that change the direction of the text after them, each with its visible replacement."""
# Characters in a crew's text that could move the cursor, change the title or change the direction of a line.
_CONTROLS = TURNS | {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}
EXCERPT = 500
"""The most characters of an answer's body in an error."""
_NAMES, _NAME = 30, 80  # names that a message lists, and characters of each: a server may name any number
SHOWN, _LINES = 20, 10  # reasons or columns that a message lists, and lines that it names for each reason


def plain(text: str) -> str:
    """Return text from outside without control characters, so that it cannot control the terminal."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """Return text from outside as part of one line, of a log or of a terminal."""
    return " ".join(plain(text).split())


def excerpt(text: str, limit: int = EXCERPT) -> str:
    """Return `text` on one line, cut to `limit` characters, with the number of missing characters."""
    flat = one_line(text)
    return flat if len(flat) <= limit else f"{flat[:limit]}… ({len(flat) - limit} more characters)"


def listed_names(names: Sequence[str]) -> str:
    """Return a list of names for people, on one line, with a limited number of names."""
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return f"{', '.join(excerpt(name, _NAME) for name in names[:_NAMES])}{more}"


def with_guesses(unknown: Sequence[str], names: Iterable[str]) -> str:
    """Return unknown names for people, each with a similar known name, if there is one."""
    near = [name for name in islice(names, 200) if len(name) <= _NAME]  # the cost grows with all of these

    def guess(name: str) -> str:
        matches = get_close_matches(name, near, n=1) if len(name) <= _NAME else []
        return f"{name} (did you mean {matches[0]}?)" if matches else name

    return listed_names([guess(name) for name in unknown[:_NAMES]] + [*unknown[_NAMES:]])


def problems_of(error: ValidationError, fields: Iterable[str] = ()) -> list[str]:
    """Return pydantic's problems, each with its place and without the value, which may be a secret.

    `fields` are the known names, from which a similar one is proposed for an unknown field.
    """
    details = error.errors(include_url=False, include_input=False, include_context=False)
    fields = list(fields)

    def text(problem: Any) -> str:
        if problem["type"] == "missing":
            return "it is missing"
        if problem["type"] != "extra_forbidden":
            return problem["msg"].removeprefix("Value error, ")
        near = get_close_matches(str(problem["loc"][-1])[:_NAME], fields, n=1)
        return f"there is no such field{f' (did you mean {near[0]}?)' if near else ''}"

    texts = [text(problem) for problem in details]
    places = [".".join(map(str, detail["loc"])) for detail in details]
    return [f"{place}: {text}" if place else text for place, text in zip(places, texts, strict=True)]


def by_reason(rows: Sequence[Any], count: int) -> tuple[list[tuple[str, str]], int]:
    """Group rows that cannot be run by their reason.

    Args:
        rows: The known rows, each with `line` and `reason`.
        count: The number of all such rows.

    Returns:
        A pair for each of the first `SHOWN` reasons: its lines as text, and the reason; and the number of all other
        rows.
    """
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(row.reason, []).append(row.line)
    reasons: list[tuple[str, str]] = []
    rest = count
    for reason, lines in list(groups.items())[:SHOWN]:
        total = count if len(groups) == 1 else len(lines)
        words = [str(line) for line in lines[:_LINES]]
        if total > len(words):
            words.append(f"{total - len(words):,} more")
        *most, last = words
        reasons.append((f"lines {', '.join(most)} and {last}" if most else f"line {last}", reason))
        rest -= total
    return reasons, rest


def listed_rows(rows: Sequence[Any], count: int) -> str:
    """Return the lines of rows that cannot be run, with the reasons, as one text."""
    reasons, rest = by_reason(rows, count)
    return "; ".join(
        [f"{where}: {reason}" for where, reason in reasons] + ([f"and {rest:,} more rows"] if rest else [])
    )


def version_numbers(version: str) -> list[int]:
    """Return the first three numbers of a version, without those of a local build."""
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]
