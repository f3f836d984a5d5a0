"""Faults: what the local crew server does wrong on purpose, where, and when.

In text, on the command line and in YAML:

    PLACE:NAME[=VALUE][@WHEN][%PROBABILITY]

    kickoff:drop-after-accept@1      the first kickoff starts a run, and its connection is closed without an answer
    status:500@3-5                   the third to the fifth status call are answered with 500
    status:429=2%0.1                 every tenth status call, at random, with Retry-After: 2
    kickoff:early-404=3              each run is unknown to its first three status calls
    any:latency=0.5                  half a second on everything

WHEN is counted from 1 over the requests of that place (for webhooks, over deliveries) since the fault was there:
`3`, `1,4`, `2-5`, `3-`. Left out, it is every one. In Python, `Fault("kickoff", "drop-after-accept", on=1)` is the same
as its text.

A fault `-before-accept` comes instead of the work; one `-after-accept` comes once the work was done and only the answer
goes wrong. With neither it is before.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

HTTP_PLACES = ("inputs", "kickoff", "status", "resume", "stop", "any")
WEBHOOK_PLACES = ("webhook", "webhook-task", "webhook-step", "webhook-crew", "webhook-human", "webhook-stream")
PLACES = HTTP_PLACES + WEBHOOK_PLACES
"""Where a fault can be. `any` is every HTTP request, `webhook` every delivery."""

Group = Literal["answer", "run", "delivery"]


@dataclass(frozen=True)
class Kind:
    """What a name means. `group` says who carries it out; `value` is the default of VALUE, None if it has none."""

    name: str
    group: Group
    places: tuple[str, ...]
    value: float | None
    text: str
    phases: bool = False
    after: bool = False
    """Whether it comes after the work when the name does not say."""


def _kinds() -> Iterator[Kind]:
    http = HTTP_PLACES
    yield Kind("latency", "answer", http, 1.0, "waits VALUE seconds, then goes on")
    for code in (400, 401, 403, 404, 405, 408, 422, 500, 502, 504):
        yield Kind(str(code), "answer", http, None, f"answers {code}", phases=True)
    yield Kind("429", "answer", http, 1.0, "answers 429 with Retry-After: VALUE", phases=True)
    yield Kind("429-bare", "answer", http, None, "answers 429 without Retry-After", phases=True)
    yield Kind("503", "answer", http, 1.0, "answers 503 with Retry-After: VALUE", phases=True)
    yield Kind("503-bare", "answer", http, None, "answers 503 without Retry-After", phases=True)
    yield Kind("drop", "answer", http, None, "closes the connection without an answer", phases=True)
    yield Kind("reset", "answer", http, None, "resets the connection (RST)", phases=True)
    yield Kind(
        "timeout", "answer", http, 0.0, "never answers; with a VALUE, closes after that many seconds", phases=True
    )
    yield Kind("redirect", "answer", http, None, "answers 307 to another path", phases=True)
    yield Kind("html", "answer", http, None, "answers 200 with an HTML page", phases=True)
    yield Kind("garbage", "answer", http, None, "answers 200 with JSON that is cut off", phases=True)
    yield Kind("empty", "answer", http, None, "answers 200 with an empty body", phases=True)
    yield Kind(
        "cut", "answer", http, None, "closes the connection in the middle of the answer", phases=True, after=True
    )
    yield Kind("no-id", "answer", ("kickoff",), None, "answers 200 without an id", phases=True, after=True)
    yield Kind("crash", "answer", http, None, "the server dies without a word", phases=True)
    yield Kind("early-404", "run", ("kickoff", "status"), 2.0, "the run is unknown to its first VALUE status calls")
    yield Kind("early-404-seconds", "run", ("kickoff", "status"), 1.0, "the run is unknown for VALUE seconds")
    yield Kind("stuck", "run", ("kickoff",), None, "the run starts and gets nowhere")
    yield Kind("forgotten", "answer", ("status",), None, "answers 404 for this run from now on")
    yield Kind("lose", "delivery", WEBHOOK_PLACES, None, "is never sent")
    yield Kind("double", "delivery", WEBHOOK_PLACES, None, "is sent twice")
    yield Kind("delay", "delivery", WEBHOOK_PLACES, 1.0, "is sent VALUE seconds late")


FAULTS = {kind.name: kind for kind in _kinds()}
"""All kinds of faults by name."""

_PHASE = re.compile(r"-(before|after)-accept$")
_TEXT = re.compile(r"(?P<where>[^:=@%]+):(?P<name>[^=@%]+)(=(?P<value>[^@%]+))?(@(?P<on>[^%]+))?(%(?P<chance>.+))?")


class FaultError(ValueError):
    """A fault that does not exist, or not there. The text lists what there is."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        where: One of PLACES.
        name: One of FAULTS, with `-before-accept` or `-after-accept` where that makes sense.
        on: At which occurrences, from 1: a number, several, or text such as "2-5" or "3-". None is every one.
        value: Seconds, or a number of calls; what it means and its default is in FAULTS.
        probability: 0..1; at random among those occurrences.

    Raises:
        FaultError: No such place or name, or a value that makes no sense.
    """

    where: str
    name: str
    on: int | str | tuple[int, ...] | None = None
    value: float | None = None
    probability: float | None = None
    kind: Kind = field(init=False, repr=False, compare=False)
    after: bool = field(init=False, repr=False, compare=False)
    _on: Callable[[int], bool] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.where not in PLACES:
            raise FaultError(f"There is no place {self.where!r} for a fault. Places: {', '.join(PLACES)}.")
        phase = _PHASE.search(self.name)
        kind = FAULTS.get(_PHASE.sub("", self.name))
        if kind is None or (phase and not kind.phases):
            here = ", ".join(name for name, kind in FAULTS.items() if self.where in kind.places)
            raise FaultError(
                f"There is no fault {self.name!r}. Faults of {self.where}: {here}; most of them with "
                "-before-accept or -after-accept."
            )
        if self.where not in kind.places:
            raise FaultError(f"{kind.name} is no fault of {self.where}. Its places: {', '.join(kind.places)}.")
        if self.value is not None and (kind.value is None or not 0 <= self.value < float("inf")):
            takes = "takes no value" if kind.value is None else "takes a number of 0 or more"
            raise FaultError(f"The fault {self.name} {takes}, not {self.value!r}.")
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise FaultError(f"The probability of {self.name} must be between 0 and 1, not {self.probability!r}.")
        set_ = object.__setattr__  # the dataclass is frozen
        set_(self, "kind", kind)
        set_(self, "after", phase.group(1) == "after" if phase else kind.after)
        set_(self, "_on", _occurrences(self.on))
        if self.value is None:
            set_(self, "value", kind.value)
        if kind.group == "run":
            set_(self, "where", "kickoff")  # that is where the run's fate is drawn

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read the text form.

        Raises:
            FaultError: It is none.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise FaultError(
                f"{text!r} is not a fault. Write PLACE:NAME[=VALUE][@WHEN][%PROBABILITY], "
                "such as kickoff:drop-after-accept@1."
            )
        return cls(
            match["where"].strip(),
            match["name"].strip(),
            on=match["on"],
            value=_number(match["value"], "value", text),
            probability=_number(match["chance"], "probability", text),
        )

    def __str__(self) -> str:
        value = f"={self.value:g}" if self.value is not None and self.value != self.kind.value else ""
        on = ",".join(map(str, self.on)) if isinstance(self.on, tuple) else self.on
        chance = "" if self.probability is None else f"%{self.probability:g}"
        return f"{self.where}:{self.name}{value}{'' if on is None else f'@{on}'}{chance}"

    def hits(self, occurrence: int, seed: str) -> bool:
        """Whether it comes at this occurrence; the same answer every time."""
        if not self._on(occurrence):
            return False
        # A generator of its own per occurrence, so that what other faults and other requests do changes nothing.
        return self.probability is None or random.Random(f"{seed}:{occurrence}").random() < self.probability  # noqa: S311


@dataclass(frozen=True)
class Fired:
    """A fault that came: at which place, and at which occurrence of it."""

    fault: Fault
    where: str
    occurrence: int


class Faults:
    """The faults of one server, and how often each place was visited.

    Args:
        faults: Faults, or their texts.
        seed: For those at random; the same seed and the same requests give the same faults.
    """

    def __init__(self, faults: Iterable[Fault | str] = (), *, seed: int = 0) -> None:
        self.seed = seed
        self.fired: list[Fired] = []
        self.visits: Counter[str] = Counter()
        self._faults: list[tuple[Fault, int]] = []
        self.add(*faults)

    def __iter__(self) -> Iterator[Fault]:
        return iter([fault for fault, _ in self._faults])

    def add(self, *faults: Fault | str) -> None:
        """Add faults, also while the server runs: the occurrences of each are counted from when it was added."""
        for item in faults:
            fault = Fault.parse(item) if isinstance(item, str) else item
            self._faults = [*self._faults, (fault, self.visits[fault.where])]  # replaced, since another thread reads it

    def clear(self) -> None:
        """From now on, do nothing wrong. What already happened to a run stays."""
        self._faults = []

    def draw(self, *places: str) -> list[Fault]:
        """Count one visit of these places, which are names of the same request, and return the faults it meets."""
        met: list[Fault] = []
        for place in places:
            self.visits[place] += 1
        for index, (fault, before) in enumerate(self._faults):
            occurrence = self.visits[fault.where] - before
            if fault.where in places and fault.hits(occurrence, f"{self.seed}:{index}"):
                met.append(fault)
                self.fired.append(Fired(fault, places[0], occurrence))
        return met


def _number(text: str | None, what: str, fault: str) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise FaultError(f"The {what} of the fault {fault!r} is not a number.") from None


def _occurrences(on: int | str | tuple[int, ...] | None) -> Callable[[int], bool]:
    """Return a test of occurrences for what `Fault.on` can be."""
    if on is None:
        return lambda _: True
    parts = [str(on)] if isinstance(on, int) else [str(n) for n in on] if isinstance(on, tuple) else on.split(",")
    ranges: list[tuple[int, float]] = []
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)\s*(?:(-)\s*(\d*))?\s*", part)
        low = int(match[1]) if match else 0
        high = (float(match[3]) if match[3] else float("inf")) if match and match[2] else float(low)
        if low < 1 or high < low:
            raise FaultError(f"{on!r} says not when: count from 1, such as 3, 1,4, 2-5 or 3-.")
        ranges.append((low, high))
    return lambda occurrence: any(low <= occurrence <= high for low, high in ranges)
