"""The encoding of values for the crew API: as JSON, or as text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any, cast
from uuid import UUID

from pydantic import BaseModel, Secret, SecretStr

from prefect_crew.exceptions import ConfigurationError

_PROBLEMS: dict[type[Exception], str] = {
    UnicodeEncodeError: "text with a lone surrogate",
    ValueError: "a number that is not finite or has too many digits, or a value within itself",
    RecursionError: "a value that is nested too deeply",
}


def encode_inputs(inputs: Mapping[str, Any], *, as_json: bool = False) -> dict[str, Any]:
    """Encode `inputs` for the API: every value as text, or with `as_json` as a JSON value.

    Dates and times (ISO 8601), decimals, UUIDs and paths become their text; an Enum counts as its value; dataclasses
    and pydantic models become objects. Without `as_json`, numbers, booleans, lists and objects become compact JSON,
    with letters of other scripts unescaped. An input that is None is left out. A secret is sent in plain text.

    Raises:
        ConfigurationError: A name is not text, or a value cannot be sent. The message does not show the value.
    """
    encoded: dict[str, Any] = {}
    for name, value in cast("Mapping[Any, Any]", inputs).items():
        if not isinstance(name, str):
            raise ConfigurationError(f"The name of an input has to be text, not {type(name).__name__}.")
        try:
            plain = as_plain([name, value])[1]
        except (TypeError, ValueError, RecursionError) as error:
            problem = _PROBLEMS.get(type(error)) or str(error)
            raise ConfigurationError(f"Input {name!a} holds {problem}, which cannot be sent.") from None
        if plain is not None:
            encoded[name] = plain if as_json else as_text(plain)
    return encoded


def as_plain(value: Any) -> Any:
    """Return `value` as a JSON value. Raises TypeError, ValueError or RecursionError if it cannot be one.

    pydantic's `to_jsonable_python` does not fit, since it masks secrets, accepts bytes as text and NaN as a number,
    leaves sets without order, and writes UTC as "Z", which would change the digests of inputs.
    """
    return json.loads(_dumps(value, replacement).encode())  # encoding refuses lone surrogates


def as_text(plain: Any) -> str:
    """Return a JSON value as text, for a crew API that takes only text."""
    return plain if isinstance(plain, str) else _dumps(plain)


def _dumps(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=default)


def replacement(value: Any) -> Any:
    """Return a value of a type nearer to JSON."""
    if isinstance(value, SecretStr | Secret):
        return cast("Any", value).get_secret_value()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime | date | time) and value == value:  # pandas' NaT is a datetime, unequal to itself
        return value.isoformat()
    if isinstance(value, UUID | PurePath) or (isinstance(value, Decimal) and value.is_finite()):
        return str(value)
    if isinstance(value, Fraction):
        return float(value)
    if isinstance(value, BaseModel):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(cast("Mapping[Any, Any]", value))
    if isinstance(value, Set):
        # A set has no order of its own, and equal inputs must have equal digests.
        return sorted(cast("Set[Any]", value), key=lambda item: as_text(as_plain(item)))
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(cast("Sequence[Any]", value))
    # A number or an array of NumPy: booleans, numbers, text and objects. Not times: `tolist` returns bare numbers.
    other = cast("Any", value)
    if getattr(getattr(other, "dtype", None), "kind", None) in ("b", "i", "u", "f", "U", "O"):
        return other.tolist()
    raise TypeError(f"a value of type {type(other).__name__}")


def is_uuid(value: Any) -> bool:
    """Return whether an encoded value is the text of a UUID."""
    try:
        UUID(value)
    except (AttributeError, TypeError, ValueError):
        return False
    return True
