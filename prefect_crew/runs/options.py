"""The options of a call, besides its crew and inputs: checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from prefect_crew.client.inputs import is_uuid
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import ConfigurationError


def check_choices(
    *,
    idempotency_key: Any = None,
    name: Any = None,
    wait: Any = None,
    output_type: Any = None,
    review: Any = None,
    meta: Any = None,
    webhooks: Any = None,
    restore_from: Any = None,
) -> None:
    """Refuse what can be known not to work: not everybody has types, and a kickoff cannot be undone.

    Raises:
        ConfigurationError: One of them is of a kind that it cannot be; the message says which it should be.
    """
    for of, text in (("idempotency_key", idempotency_key), ("name", name)):
        _check(text is None or isinstance(text, str), of, "a text", text)
        if text is not None and not _sendable(text):
            raise ConfigurationError(
                f"{of} {text!r} holds half a character (a lone surrogate), which cannot be stored. Nothing was started."
            )
    _check(wait is None or isinstance(wait, WaitPolicy), "wait", "a WaitPolicy, such as WaitPolicy(timeout=600)", wait)
    model = output_type is None or (isinstance(output_type, type) and issubclass(output_type, BaseModel))
    _check(model, "output_type", "a pydantic model: a class that inherits from pydantic.BaseModel", output_type)
    _check(review is None or review == "form" or callable(review), "review", "'form' or a function", review)
    _check(meta is None or isinstance(meta, Mapping), "meta", "a mapping: an object of JSON", meta)
    state = restore_from is None or isinstance(restore_from, UUID) or is_uuid(restore_from)
    _check(state, "restore_from", "the UUID of a Flow's state", restore_from)
    if webhooks is not None:
        from prefect_crew.client.webhooks import Webhooks

        _check(isinstance(webhooks, Webhooks), "webhooks", "Webhooks(task=…, crew=…)", webhooks)


def _check(fits: bool, name: str, wanted: str, given: Any) -> None:
    if fits:
        return
    # A text that was meant for a choice is shown; of anything else the type says enough, and holds no secret.
    shown = repr(given[:40]) if name in ("review", "restore_from") and isinstance(given, str) else _kind(given)
    raise ConfigurationError(f"{name} is {shown}; it has to be {wanted}. Nothing was started.")


def _sendable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(given: Any) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}"
    return f"a value of type {type(given).__name__}"
