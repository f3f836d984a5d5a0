"""JSON that can always be sent, whatever a crew or its inputs hold."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

from starlette.responses import JSONResponse

_DEPTH = 200


class JSONAnswer(JSONResponse):
    """A JSON response that no value turns into a 500."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return to_json(content)


def to_json(value: Any) -> bytes:
    """Return `value` as JSON in UTF-8.

    What JSON cannot hold becomes what is nearest: NaN and infinities null, unknown objects their text, keys text, half
    a surrogate pair its escape.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return json.dumps(_nearest(value, 0), allow_nan=False, separators=(",", ":")).encode()


def _nearest(value: Any, depth: int) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if depth < _DEPTH and isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {str(key): _nearest(item, depth + 1) for key, item in items}
    if depth < _DEPTH and isinstance(value, (list, tuple, set, frozenset)):
        return [_nearest(item, depth + 1) for item in cast("Iterable[Any]", value)]
    return f"<{type(value).__name__}>" if depth >= _DEPTH else str(value)
