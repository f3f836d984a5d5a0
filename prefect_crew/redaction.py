"""Keeping secrets out of what people and databases see: logs, artifacts, events, errors, records."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any, cast
from urllib.parse import quote

from pydantic import BaseModel, SecretBytes, SecretStr

from prefect_crew.api.inputs import encode_inputs

__all__ = ["MASK", "Redactor", "holds_secret"]

MASK = "********"
SHORTEST = 4
"""Characters. A shorter secret is masked as an input, but not hunted for in texts, where it would hit at random."""


class Redactor:
    """Masks some values wherever they stand in a text. Equal values of an input and an output are masked alike."""

    def __init__(self, secrets: Iterable[str]) -> None:
        # The longest first, so that one secret that holds another is not left in pieces.
        self._secrets = sorted({value for value in secrets if len(value) >= SHORTEST}, key=len, reverse=True)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The values that are masked."""
        return tuple(self._secrets)

    @classmethod
    def of(cls, token: str, inputs: Mapping[str, Any], secret_inputs: Iterable[str]) -> Redactor:
        """Take a crew's token and the values of its secret inputs."""
        named = {name: inputs[name] for name in secret_inputs if name in inputs}
        values = [token]
        for value in named.values():
            values.extend(_texts(value))
        values.extend(str(value) for value in encode_inputs(named).values())
        # As it stands within JSON that somebody quotes, on a page, in an address.
        values.extend(
            json.dumps(value, ensure_ascii=ascii_)[1:-1] for value in list(values) for ascii_ in (True, False)
        )
        for value in list(values):
            values.extend((html.escape(value), quote(value, safe=""), quote(value)))
        return cls(values)

    def __call__(self, text: str) -> str:
        """Return the text with every secret masked."""
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return text

    def tree(self, value: Any) -> Any:
        """Return a JSON-like value with every secret masked in every text of it."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            pairs = cast("Mapping[Any, Any]", value).items()
            return {self.tree(key): self.tree(item) for key, item in pairs}
        if isinstance(value, list | tuple):
            return [self.tree(item) for item in cast("list[Any]", value)]
        return value

    def hides(self, value: Any) -> bool:
        """Return whether a secret stands in a text, or in any text of a JSON-like value."""
        return self.tree(value) != value


def holds_secret(value: Any) -> bool:
    """Return whether a value is one of pydantic's secrets, or has one within it."""
    if isinstance(value, SecretStr | SecretBytes):
        return True
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="python")
    if isinstance(value, Mapping):
        return any(holds_secret(item) for item in cast("Mapping[Any, Any]", value).values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(holds_secret(item) for item in cast("Iterable[Any]", value))
    return False


def _texts(value: Any) -> list[str]:
    """Return the texts and numbers inside a secret value: a crew may repeat one item of a list or an object."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, str):
        return [value, *_texts(_structure(value))]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="python")
    if isinstance(value, Mapping):
        return [text for item in cast("Mapping[Any, Any]", value).values() for text in _texts(item)]
    if isinstance(value, list | tuple):
        return [text for item in cast("list[Any]", value) for text in _texts(item)]
    return []


def _structure(text: str) -> Any:
    """Return the list or object that a text is in JSON, which is how inputs of such values are sent; else None."""
    if text[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
