"""Secret inputs of flows whose parameters Prefect stores: a parameter is the name of a Secret block, never a secret."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any, cast

from prefect.blocks.system import Secret
from pydantic import Secret as SealedValue

from prefect_crew.exceptions import ConfigurationError


async def values_of_blocks(given: Mapping[str, Any], secret_inputs: Collection[str]) -> dict[str, Any]:
    """Return inputs with the values of Prefect Secret blocks in place of their names, for those that are secret.

    The values are pydantic's secrets: error reporters show the local variables of whoever holds them.

    Raises:
        ConfigurationError: There is no such block. What was given is not shown: it may be the secret itself.
    """
    names = [name for name in given if name in secret_inputs]
    values = await asyncio.gather(*(_value(name, given[name]) for name in names))
    return {**given, **dict(zip(names, values, strict=True))}


async def _value(name: str, block: Any) -> Any:
    try:
        return SealedValue((await cast("Any", Secret).aload(str(block))).get())
    except ValueError:
        raise ConfigurationError(
            f"The input {name!r} is secret, so it is given as the name of a Prefect Secret block, and no block has the "
            "name that was given. Nothing was started. Make one, and give its name: Secret(value=…).save('NAME')."
        ) from None
