"""Values as the crew API takes them: text, or JSON."""

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
    """A value that has no JSON; the text says what it is, without showing it."""


def encode_inputs(inputs: Mapping[str, Any], *, as_json: bool = False) -> dict[str, Any]:
    """Return `inputs` as the API takes them: every value as text, or with `as_json` as JSON values.

    Numbers, booleans ("true", "false"), dates and times (ISO 8601), decimals, UUIDs and paths become their text; an
    Enum counts as its value; lists, objects, dataclasses and pydantic models become compact JSON with other scripts
    unescaped. With `as_json` numbers, booleans, lists and objects are JSON's own. None is left out, and is null within
    a list or an object. A secret is sent as what it hides.

    Raises:
        ConfigurationError: They are no mapping, a name is not text, or a value cannot be sent. It names the input, and
            not its value.
    """
    if not isinstance(inputs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # not everybody has types
        raise ConfigurationError(f"Inputs are a mapping of names to values, not a {type(inputs).__name__}.")
    encoded: dict[str, Any] = {}
    for name, value in cast("Mapping[Any, Any]", inputs).items():
        if not isinstance(name, str):
            raise ConfigurationError(f"The name of an input is text, not {type(name).__name__}.")
        try:
            plain = _plain(value)
            if plain is not None:
                encoded[_text(name)] = plain if as_json else as_text(plain)
        except (_UnsendableError, RecursionError) as error:
            problem = str(error) if isinstance(error, _UnsendableError) else "a value that is nested too deeply"
            raise ConfigurationError(f"Input {name!r} holds {problem}, which cannot be sent.") from None
    return encoded


def as_text(plain: Any) -> str:
    """Return a JSON value as the crew API takes it where everything is text."""
    if isinstance(plain, str):
        return plain
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    """Return `value` as JSON values only.

    pydantic's own `to_jsonable_python` masks secrets, takes bytes for text and NaN for a number, leaves sets without
    order, and writes UTC as "Z": digests that stand in records would change.
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
    # An array of NumPy, as pandas has for a list that it read from Parquet. Its times are left out: `tolist` makes bare
    # numbers of those in nanoseconds.
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
    # A decimal may be larger than a float can be.
    if not (value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)):
        raise _UnsendableError("a number that is not finite")
    return str(value) if isinstance(value, Decimal) else float(value)


def _key(key: Any) -> str:
    plain = _plain(key)
    if plain is None or isinstance(plain, list | dict):
        raise _UnsendableError(f"a value of type {type(key).__name__} as a key")
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
