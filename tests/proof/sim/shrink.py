"""Making a failing world small: parts are dropped for as long as it still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from proof.sim.scenario import Scenario

__all__ = ["shrunk"]


def shrunk(scenario: Scenario, fails: Callable[[Scenario], bool], tries: int = 400) -> Scenario:
    """Return a failing world from which nothing can be dropped, or what is left after so many tries."""
    while tries > 0:
        for smaller in _smaller(scenario):
            tries -= 1
            if fails(smaller):
                scenario = smaller
                break
            if tries <= 0:
                break
        else:
            break
    return scenario


def _smaller(whole: Any) -> Iterator[Any]:
    """Yield the values with one part less: an element of a tuple, or a field that is as usual instead."""
    for field in fields(whole):
        value = getattr(whole, field.name)
        if value == field.default or (field.name == "calls" and len(value) < 2):
            inner: Iterator[Any] = iter(())
        elif isinstance(value, tuple):
            inner = (value[:n] + value[n + 1 :] for n in range(len(value)))
        else:
            inner = iter((field.default,))
        yield from (replace(whole, **{field.name: one}) for one in inner)
    for field in fields(whole):
        value = getattr(whole, field.name)
        for n, part in enumerate(value if isinstance(value, tuple) else ()):
            for less in _smaller(part) if hasattr(part, "__dataclass_fields__") else ():
                yield replace(whole, **{field.name: (*value[:n], less, *value[n + 1 :])})
