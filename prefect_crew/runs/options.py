"""The options of a call, other than its crew and inputs: checked before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast
from uuid import UUID

from pydantic import BaseModel

from prefect_crew.budgets import Budget
from prefect_crew.client.encoding import is_uuid
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import ConfigurationError

_CHOICES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "idempotency_key": ("a text", lambda given: isinstance(given, str)),
    "name": ("a text", lambda given: isinstance(given, str)),
    "wait": ("a WaitPolicy, such as WaitPolicy(timeout=600)", lambda given: isinstance(given, WaitPolicy)),
    "output_type": (
        "a pydantic model: a class that inherits from pydantic.BaseModel",
        lambda given: isinstance(given, type) and issubclass(given, BaseModel),
    ),
    "review": ("'form' or a function", lambda given: given == "form" or callable(given)),
    "meta": ("a mapping: an object of JSON", lambda given: isinstance(given, Mapping)),
    "restore_from": ("the UUID of a Flow's state", lambda given: isinstance(given, UUID) or is_uuid(given)),
    "budgets": (
        "Budgets, such as [Budget(max_cost=20, per='day')]",
        lambda given: isinstance(given, list | tuple) and all(isinstance(one, Budget) for one in cast("Any", given)),
    ),
    "webhooks": ("Webhooks(task=…, crew=…)", lambda given: isinstance(given, Webhooks)),
}


def check_choices(**choices: Any) -> None:
    """Refuse what can be known not to work: not everybody has types, and a kickoff cannot be undone.

    Raises:
        ConfigurationError: One of them is of a kind that it cannot be; the message says which it should be.
    """
    for name, given in choices.items():
        wanted, fits = _CHOICES[name]
        if given is not None and not fits(given):
            # A text that was meant for a choice is shown; of anything else the type says enough, and holds no secret.
            shown = repr(given[:40]) if name in ("review", "restore_from") and isinstance(given, str) else None
            kind = (
                f"the class {given.__name__}" if isinstance(given, type) else f"a value of type {type(given).__name__}"
            )
            raise ConfigurationError(f"{name} is {shown or kind}; it has to be {wanted}. Nothing was started.")
        if isinstance(given, str) and any("\ud800" <= letter <= "\udfff" for letter in given):
            raise ConfigurationError(
                f"{name} {given!r} holds half a character (a lone surrogate), which cannot be stored. Nothing was "
                "started."
            )
