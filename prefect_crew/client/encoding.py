"""The encoding of values for the crew API: as text, or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping, Sequence, Set
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, cast
from uuid import UUID

from pydantic import BaseModel, Secret, SecretBytes, SecretStr

from prefect_crew.exceptions import ConfigurationError

_ARRAY_KINDS = frozenset("biufUO")
"""NumPy's kinds of booleans, numbers, text and objects."""


class _UnsendableError(ValueError):
    """A value that cannot be JSON. The message has its type, not the value."""


def encode_inputs(inputs: Mapping[str, Any], *, as_json: bool = False) -> dict[str, Any]:
    """Encode `inputs` for the API: every value as text, or with `as_json` as a JSON value.

    Numbers, booleans ("true", "false"), dates and times (ISO 8601), decimals, UUIDs and paths become their text; an
    Enum counts as its value; lists, objects, dataclasses and pydantic models become compact JSON, with letters of other
    scripts unescaped. With `as_json` numbers, booleans, lists and objects stay JSON values. An input that is None is
    left out; within a list or an object None is null. A secret is sent in plain text.

    Raises:
        ConfigurationError: `inputs` is no mapping, a name is not text, or a value cannot be sent. The message names the
            input and does not show its value.
    """
    if not isinstance(inputs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # not everybody has types
        raise ConfigurationError(f"Inputs have to be a mapping of names to values, not a {type(inputs).__name__}.")
    encoded: dict[str, Any] = {}
    for name, value in cast("Mapping[Any, Any]", inputs).items():
        if not isinstance(name, str):
            raise ConfigurationError(f"The name of an input has to be text, not {type(name).__name__}.")
        try:
            plain = _plain(value)
            if plain is not None:
                encoded[_text(name)] = plain if as_json else as_text(plain)
        except (_UnsendableError, RecursionError) as error:
            problem = str(error) if isinstance(error, _UnsendableError) else "a value that is nested too deeply"
            raise ConfigurationError(f"Input {name!r} holds {problem}, which cannot be sent.") from None
    return encoded


def as_text(plain: Any) -> str:
    """Return a JSON value as text, for a crew API that takes only text."""
    if isinstance(plain, str):
        return plain
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    """Return `value` as a JSON value.

    pydantic's `to_jsonable_python` does not fit, since it masks secrets, accepts bytes as text and NaN as a number,
    leaves sets without order, and writes UTC as "Z", which would change the digests of inputs.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, SecretStr | Secret):
        return _plain(cast("Any", value).get_secret_value())
    if isinstance(value, numbers.Number | Decimal):
        return _number(value)
    if isinstance(value, datetime | date | time) and value == value:  # pandas' NaT is a datetime, unequal to itself
        return value.isoformat()
    if isinstance(value, str | UUID | PurePath):
        return _text(str(value))
    return _container(value)


def _container(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="python"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, Set):
        # A set has no order of its own, and equal inputs must have equal digests.
        return sorted((_plain(item) for item in cast("Set[Any]", value)), key=as_text)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview | SecretBytes):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    # An array of NumPy: pandas returns one for a list in Parquet. Arrays of times are refused: `tolist` returns bare
    # numbers for nanoseconds.
    kind = getattr(getattr(cast("Any", value), "dtype", None), "kind", None)
    if isinstance(kind, str) and kind in _ARRAY_KINDS:
        return _plain(cast("Any", value).tolist())
    raise _UnsendableError(f"a value of type {type(cast('object', value)).__name__}")


def _number(value: Any) -> int | float | str:
    if isinstance(value, numbers.Integral):
        try:
            return int(str(int(value)))
        except ValueError:
            raise _UnsendableError("a number of too many digits") from None
    if not isinstance(value, Decimal | numbers.Real):
        raise _UnsendableError(f"a value of type {type(value).__name__}")
    # A decimal may be too large for a float.
    if not (value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)):
        raise _UnsendableError("a number that is not finite")
    return str(value) if isinstance(value, Decimal) else float(value)


def _key(key: Any) -> str:
    plain = _plain(key)
    if plain is None or isinstance(plain, list | dict):
        raise _UnsendableError(f"a key of type {type(key).__name__}")
    return as_text(plain)


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _UnsendableError("text with a lone surrogate") from None
    return text


def is_uuid(value: Any) -> bool:
    """Return whether an encoded value is the text of a UUID."""
    try:
        UUID(value)
    except (AttributeError, TypeError, ValueError):
        return False
    return True
