"""Faults: mistakes that the dev server makes on purpose. Their text is `PLACE:NAME[=VALUE][@WHEN]`.

    kickoff:drop-after-accept@1      the first kickoff starts a run, and its connection is closed without an answer
    status:429=2@4-                  from the fourth on, status calls are answered with 429 and Retry-After: 2

A fault `-before-accept` replaces the work. A fault `-after-accept` comes after the work, and only the answer goes
wrong. Without a suffix, a fault comes before the work.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

HTTP_PLACES = ("inputs", "kickoff", "status", "resume", "stop", "inspect", "any")
WEBHOOK_PLACES = ("webhook", "webhook-task", "webhook-step", "webhook-crew", "webhook-human", "webhook-stream")
PLACES = HTTP_PLACES + WEBHOOK_PLACES
"""The places of faults. `any` is every HTTP request but `GET /inspect`, `webhook` every delivery."""


class Kind(NamedTuple):
    """A fault: the text says what the server does, `value` is the default of VALUE (None if it takes none), `places`
    are its possible places, `group` is the thing that it spoils.
    """

    text: str
    value: float | None = None
    places: tuple[str, ...] = HTTP_PLACES
    group: Literal["answer", "time", "hold", "run", "delivery"] = "answer"

    @property
    def has_phases(self) -> bool:
        """Whether the name may end in `-before-accept` or `-after-accept`."""
        return self.group in ("answer", "hold")


FAULTS = {
    "latency": Kind("waits VALUE seconds, then goes on", 1.0, group="time"),
    "hold": Kind("waits until `CrewServer.release()`, then goes on", group="hold"),
    **{str(code): Kind(f"answers {code}") for code in (400, 401, 403, 404, 405, 408, 422, 500, 502, 504)},
    "429": Kind("answers 429 with Retry-After: VALUE", 1.0),
    "429-bare": Kind("answers 429 without Retry-After"),
    "503": Kind("answers 503 with Retry-After: VALUE", 1.0),
    "503-bare": Kind("answers 503 without Retry-After"),
    "drop": Kind("closes the connection without an answer"),
    "timeout": Kind("never answers; with a VALUE, closes after that many seconds", 0.0),
    "redirect": Kind("answers 307 to another path"),
    "html": Kind("answers 200 with an HTML page"),
    "garbage": Kind("answers 200 with JSON that is cut off"),
    "empty": Kind("answers 200 with an empty body"),
    "no-id": Kind("answers 200 without an id", places=("kickoff",)),
    "forgotten": Kind("answers 404 for this run from now on", places=("status",), group="run"),
    "early-404": Kind("the run is unknown to its first VALUE status calls", 2.0, ("kickoff", "status"), "run"),
    "early-404-seconds": Kind("the run is unknown for VALUE seconds", 1.0, ("kickoff", "status"), "run"),
    "stuck": Kind("the run starts and gets nowhere", None, ("kickoff",), "run"),
    "lose": Kind("is never sent", None, WEBHOOK_PLACES, "delivery"),
    "double": Kind("is sent twice", None, WEBHOOK_PLACES, "delivery"),
    "delay": Kind("is sent VALUE seconds late", 1.0, WEBHOOK_PLACES, "delivery"),
}
"""All kinds of faults by name."""

_TEXT = re.compile(r"(?P<where>[^:=@]+):(?P<name>[^=@]+)(=(?P<value>\d+(\.\d+)?))?(@(?P<on>.+))?")
_RANGE = re.compile(r"([1-9]\d*)(-?)(\d*)")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        where: One of PLACES.
        name: One of FAULTS, with `-before-accept` or `-after-accept` if the fault takes these.
        on: At which occurrences, from 1: a number, or text such as "1,4", "2-5" or "3-". None is every one.
        value: Seconds, or a number of calls; its meaning and default are in FAULTS.

    Raises:
        ValueError: An unknown place or name, or a wrong value or occurrence.
    """

    where: str
    name: str
    on: int | str | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        if self.where not in PLACES:
            raise ValueError(f"{self.where!r} is no place for a fault. Places: {', '.join(PLACES)}.")
        kind = FAULTS.get(self.base_name)
        if kind is None or self.where not in kind.places or (self.name != self.base_name and not kind.has_phases):
            here = ", ".join(name for name, kind in FAULTS.items() if self.where in kind.places)
            raise ValueError(
                f"{self.where!r} has no fault {self.name!r}. It has {here}; most of them also take -before-accept or "
                "-after-accept."
            )
        if self.value is not None and kind.value is None:
            raise ValueError(f"The fault {self.name} takes no value.")
        if not all(_RANGE.fullmatch(part) for part in self._parts):
            raise ValueError(f"{self.on!r} is no list of call numbers, such as '3', '1,4', '2-5' or '3-'.")
        if self.value is None:
            object.__setattr__(self, "value", kind.value)  # the dataclass is frozen
        if "kickoff" in kind.places and kind.group == "run":
            object.__setattr__(self, "where", "kickoff")  # a run has these from its kickoff on

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read the text form."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not a fault. Write PLACE:NAME[=VALUE][@WHEN], such as kickoff:drop-after-accept@1."
            )
        return cls(match["where"], match["name"], match["on"], float(match["value"]) if match["value"] else None)

    @property
    def base_name(self) -> str:
        """The name in FAULTS."""
        return self.name.removesuffix("-before-accept").removesuffix("-after-accept")

    @property
    def kind(self) -> Kind:
        """The kind of the fault."""
        return FAULTS[self.base_name]

    @property
    def is_after(self) -> bool:
        """Whether the fault comes after the work."""
        return self.name.endswith("-after-accept")

    @property
    def _parts(self) -> list[str]:
        return ("1-" if self.on is None else str(self.on)).split(",")

    def hits(self, occurrence: int) -> bool:
        """Return whether the fault comes at this occurrence, counted from 1."""
        ranges = (part.partition("-") for part in self._parts)
        return any(int(low) <= occurrence <= (float(high or "inf") if dash else int(low)) for low, dash, high in ranges)


class Faults:
    """The faults of one server, and the number of requests at each place."""

    def __init__(self, faults: Iterable[Fault | str] = ()) -> None:
        self.visits: Counter[str] = Counter()
        self._faults: list[tuple[Fault, int]] = []
        self.add(*faults)

    def add(self, *faults: Fault | str) -> None:
        """Add faults, also while the server runs. Each counts its requests from then on."""
        added = [Fault.parse(fault) if isinstance(fault, str) else fault for fault in faults]
        # Replaced, since another thread reads it.
        self._faults = [*self._faults, *((fault, self.visits[fault.where]) for fault in added)]

    def clear(self) -> None:
        """Remove all faults. Effects on runs that had one stay."""
        self._faults = []

    def draw(self, *places: str) -> list[Fault]:
        """Count one request under each of these names of its place, and return the faults that the request has."""
        self.visits.update(places)
        faults = [(fault, self.visits[fault.where] - before) for fault, before in self._faults if fault.where in places]
        return [fault for fault, occurrence in faults if fault.hits(occurrence)]
