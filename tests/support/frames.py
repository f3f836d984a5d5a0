"""What error reporters show of an error: the local variables of all frames."""

from __future__ import annotations

import traceback


def locals_of(error: BaseException, *, but: str) -> str:
    """Return the local variables of all frames of an error and its causes, but those of the file `but`."""
    shown: list[str] = []
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        one = chain.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        stack = traceback.StackSummary.extract(traceback.walk_tb(one.__traceback__), capture_locals=True)
        shown += [f"{frame.filename}:{frame.name} {frame.locals}" for frame in stack if frame.filename != but]
        chain += [one.__cause__, one.__context__]
    return "\n".join(shown)
