"""A call of a batch as plain values: what `batch retry` runs again, and what a shard on another machine is given."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.batches.datasets import Dataset, is_remote, shown_address, whole_address
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.rows import InputsFrom
from prefect_crew.waiting import WaitPolicy

__all__ = ["from_plain", "imported_model", "options_from", "plain_call", "plain_options"]

OF_ONE_CALL = ("retry_failed", "on_change")
"""Options that are about one call only."""


def plain_call(
    *,
    crew: str | None,
    secret_inputs: Sequence[str],
    dataset: Dataset,
    output: str,
    ledger: str,
    options: BatchOptions,
    shards: int = 1,
    deployment: str | None = None,
) -> dict[str, Any]:
    """Return a call as JSON values. Where that cannot be, its only key is `why_not`.

    Args:
        crew: The name of its stored block, None if it is not stored.
        secret_inputs: Its secret inputs. A call that has the value of one is not stored.
        dataset: The data set.
        output: Where the lines go.
        ledger: Where the ledger is, without a password.
        options: The options.
        shards, deployment: How it was split.
    """
    address = dataset.address
    if crew is None:
        return {"why_not": "its crew is no stored block"}
    if address is None:
        return {"why_not": "its data set was given by code"}
    if is_remote(address) and shown_address(address) != address:
        return {"why_not": "the address of its data set holds what is not for everyone"}
    if is_remote(output) and shown_address(output) != output:
        return {"why_not": "the address of its output holds what is not for everyone"}
    if given := [name for name in secret_inputs if _holds_value(options.inputs, name)]:
        return {"why_not": f"the secret inputs {', '.join(given)} were given by code and not by a column"}
    try:
        chosen = plain_options(options, without=OF_ONE_CALL)
    except ConfigurationError as error:
        return {"why_not": str(error)}
    return {
        "crew": crew,
        "dataset": whole_address(address),
        "format": dataset.format,
        "encoding": dataset.encoding,
        "output": whole_address(output),
        "ledger": ledger,
        "options": chosen,
        **({} if deployment is None else {"shards": shards, "deployment": deployment}),
    }


def _holds_value(inputs: InputsFrom | None, name: str) -> bool:
    """Return whether options say what an input is, rather than which column it comes from."""
    if inputs is None or callable(inputs):
        return False
    source = inputs.get(name)
    if not isinstance(source, str):
        return source is not None
    # Of a template, what is not within its braces, or is quoted there.
    return "{{" in source and (re.sub(r"\{\{[^'\"]*?\}\}", "", source).strip() != "")


def plain_options(options: BatchOptions, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the options that are not left at their defaults as JSON values.

    Raises:
        ConfigurationError: One of them is none, such as a function.
    """
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in without or value == field.default:
            continue
        plain[field.name] = _plain(field.name, value)
    return plain


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, WaitPolicy):
        return value.model_dump(mode="json")
    if isinstance(value, type):
        kind = cast("type[Any]", value)
        where = f"{kind.__module__}:{kind.__qualname__}"
        if kind.__module__ == "__main__" or "<" in where:
            raise ConfigurationError(f"{name} {where} cannot be imported elsewhere")
        return where
    if isinstance(value, (set, frozenset, tuple)):
        value = sorted(cast("set[str]", value))
    if callable(value):
        raise ConfigurationError(f"{name} is a function")
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise ConfigurationError(f"{name} is no plain value") from None


def options_from(plain: Mapping[str, Any], **more: Any) -> BatchOptions:
    """Return the options again.

    Raises:
        ConfigurationError: The class of `output_type` cannot be imported here, or an option makes no sense.
    """
    return BatchOptions(**from_plain({**plain, **more}))


def from_plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `run_batch` from JSON values, as a deployment's parameters hold them.

    `wait` may be the fields of a `WaitPolicy`, `output_type` is `module:Model`.

    Raises:
        ConfigurationError: One of these two makes no sense.
    """
    found = dict(given)
    if isinstance(found.get("wait"), Mapping):
        try:
            found["wait"] = WaitPolicy.model_validate(found["wait"])
        except ValidationError as error:
            said = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ConfigurationError(f"wait makes no sense: {'; '.join(said)}.") from None
    if isinstance(found.get("output_type"), str):
        found["output_type"] = imported_model(found["output_type"])
    return found


def imported_model(where: str) -> type[BaseModel]:
    """Return the pydantic model that `module:Model` names.

    Raises:
        ConfigurationError: It cannot be imported here, or is none.
    """
    module, _, name = where.partition(":")
    if not module or not name:
        raise ConfigurationError(f"output_type {where!r} is to be module:Model.")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"The output_type {where} cannot be imported here: {error}.") from None
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ConfigurationError(f"The output_type {where} is no pydantic model.")
    return found
