"""The states of a run, and the words that servers use for them."""

from __future__ import annotations

import re
from enum import StrEnum


class CrewState(StrEnum):
    """The state of a run. `str(state)` is the plain word."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    """The run waits for a person, and goes on after `/resume`."""
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    UNKNOWN = "unknown"
    """The server does not know the run."""

    @property
    def ended(self) -> bool:
        """Whether the run can no longer change."""
        return self in (CrewState.COMPLETED, CrewState.FAILED, CrewState.STOPPED)


STATE_WORDS = {
    CrewState.PENDING: "PENDING QUEUED SCHEDULED CREATED RECEIVED",
    CrewState.RUNNING: "STARTED RUNNING IN_PROGRESS PROCESSING PROGRESS RETRY RETRYING RESUMED",
    CrewState.WAITING: "PENDING_HUMAN_INPUT AWAITING_HUMAN_FEEDBACK AWAITING_HUMAN_INPUT WAITING_FOR_HUMAN "
    "HUMAN_INPUT_REQUESTED PAUSED",
    CrewState.COMPLETED: "SUCCESS SUCCEEDED COMPLETED COMPLETE DONE FINISHED",
    CrewState.FAILED: "FAILED FAILURE ERROR ERRORED TIMEOUT TIMED_OUT",
    CrewState.STOPPED: "REVOKED STOPPED CANCELLED CANCELED ABORTED",
    CrewState.UNKNOWN: "NOT_FOUND",
}
"""The known words for each state. Case, spaces, hyphens and underscores do not count."""
_LONGEST = 100
_SEPARATORS = re.compile(r"[\s_-]+")


_STATES = {word.replace("_", "").casefold(): state for state, words in STATE_WORDS.items() for word in words.split()}


def known_state(word: str) -> CrewState | None:
    """Return the state that `word` means, or None for a word that is not in the table."""
    return _STATES.get(_SEPARATORS.sub("", word).casefold()) if len(word) <= _LONGEST else None
