"""The words that servers use for a run's state."""

from __future__ import annotations

import re

from prefect_crew.api.models import CrewState

__all__ = ["STATE_WORDS", "known_state"]

STATE_WORDS: dict[CrewState, tuple[str, ...]] = {
    CrewState.PENDING: ("PENDING", "QUEUED", "SCHEDULED", "CREATED", "RECEIVED"),
    CrewState.RUNNING: (
        "STARTED",
        "RUNNING",
        "IN_PROGRESS",
        "PROCESSING",
        "PROGRESS",
        "RETRY",
        "RETRYING",
        "RESUMED",
    ),
    CrewState.WAITING: (
        "PENDING_HUMAN_INPUT",
        "AWAITING_HUMAN_FEEDBACK",
        "AWAITING_HUMAN_INPUT",
        "WAITING_FOR_HUMAN",
        "HUMAN_INPUT_REQUESTED",
        "PAUSED",
    ),
    CrewState.COMPLETED: ("SUCCESS", "SUCCEEDED", "COMPLETED", "COMPLETE", "DONE", "FINISHED"),
    CrewState.FAILED: ("FAILED", "FAILURE", "ERROR", "ERRORED", "TIMEOUT", "TIMED_OUT"),
    CrewState.STOPPED: ("REVOKED", "STOPPED", "CANCELLED", "CANCELED", "ABORTED"),
    CrewState.UNKNOWN: ("NOT_FOUND",),
}
"""Every known word, by what it means. Case, spaces, hyphens and underscores do not count."""

_LONGEST = 100
_SEPARATORS = re.compile(r"[\s_-]+")


def _plain(word: str) -> str:
    return _SEPARATORS.sub("", word).casefold()


_STATES = {_plain(word): state for state, words in STATE_WORDS.items() for word in words}


def known_state(word: str) -> CrewState | None:
    """Return the state that `word` means, or None for a word that is not in the table."""
    return _STATES.get(_plain(word)) if len(word) <= _LONGEST else None
