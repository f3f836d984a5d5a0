"""What error reporters show of an error: the local variables of all frames."""

import traceback


def locals_of(error: BaseException, *, but: str) -> str:
    """Return the local variables of all frames of an error and its causes, but those of the file `but`."""
    shown, chain = list[str](), [error]
    for link in chain:
        stack = traceback.StackSummary.extract(traceback.walk_tb(link.__traceback__), capture_locals=True)
        shown += [f"{frame.filename}:{frame.name} {frame.locals}" for frame in stack if frame.filename != but]
        chain += [cause for cause in {link.__cause__, link.__context__} - {*chain} if cause is not None]
    return "\n".join(shown)
