"""`prefect-crew save`: store a crew as a Prefect block, with its token."""

from __future__ import annotations

import asyncio
import shlex
import sys
from dataclasses import dataclass
from getpass import getpass
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._errors import reason
from prefect_crew.cli._options import CrewAccess
from prefect_crew.cli._prefect import reach_prefect
from prefect_crew.exceptions import AuthenticationError, ConfigurationError, CrewError


@Parameter(name="*")
@dataclass(frozen=True)
class BlockFields:
    """Fields of the block, named as in the block; those that are left out have the block's defaults."""

    request_timeout: Annotated[float | None, Parameter(help="Seconds that one request may take.")] = None
    inputs_as_json: Annotated[bool | None, Parameter(help="Send JSON values instead of text.")] = None
    allow_extra_inputs: Annotated[
        bool | None, Parameter(name="--allow-extra", help="Send inputs that the crew does not name, too.")
    ] = None
    max_kickoffs: Annotated[int | None, Parameter(help="How many runs may be started under one idempotency key.")] = (
        None
    )
    concurrency_limit: Annotated[str | None, Parameter(help="The Prefect concurrency limit of its runs.")] = None
    show: Annotated[
        Literal["full", "summary", "none"] | None, Parameter(help="How much artifacts show of inputs and outputs.")
    ] = None
    secret_inputs: Annotated[
        list[str] | None,
        Parameter(name="--secret-input", help="An input whose value is masked; may be given again."),
    ] = None
    price: Annotated[float | None, Parameter(help="What one run costs.")] = None


def save(
    name: Annotated[str, Parameter(name="NAME", help="The block's name: lower-case letters, digits and dashes.")],
    /,
    *,
    url: Annotated[str, Parameter(help="The crew's base URL, from the Status tab of its page.")],
    access: CrewAccess = CrewAccess(),
    fields: BlockFields = BlockFields(),
    timeout: Annotated[float | None, Parameter(help="Seconds that a run may take, pending and running.")] = None,
    human_timeout: Annotated[float | None, Parameter(help="Seconds that people may take to answer.")] = None,
    overwrite: Annotated[bool, Parameter(help="Replace the block of this name.")] = False,
) -> None:
    """Store a crew as a Prefect block, so that its name is all that flows and commands need.

    A token that is not given is asked for.
    """
    if not access.token and sys.stdin.isatty():
        token = getpass(f"Token of {url} (the Status tab of its page; not shown): ").strip()
        access = CrewAccess(token=token, allow_http=access.allow_http)
    given: dict[str, Any] = {
        **vars(fields),
        "wait": _without_none({"timeout": timeout, "human_timeout": human_timeout}) or None,
    }
    block = access.block(url, **_without_none(given))
    reach_prefect()

    async def store() -> str | None:
        """Store it, and return the command that runs it, if the crew answers now."""
        command = None
        try:
            async with access.client(url) as client:
                inputs = await client.inputs()
            options = [f"-i {shlex.quote(item.name)}=…" for item in inputs if item.required]
            command = " ".join(["prefect-crew run", shlex.quote(name), *options])
        except AuthenticationError:
            _output.note(f"The block {name} was not stored: the crew's server refused the token.")
            raise
        except CrewError as error:
            _output.note(f"The crew could not be asked for its inputs: {error}", "yellow")
        try:
            await block.asave(name, overwrite=overwrite)
        except ValueError as error:
            if "already in use" in str(error):
                raise ConfigurationError(f"There is a crew {name!r} already. Give --overwrite to replace it.") from None
            raise ConfigurationError(f"The block {name!r} was not stored: {reason(error)}") from None
        return command

    command = asyncio.run(store())
    _output.put(f"Stored crew {name} ({block.url}) as the block deployed-crew/{name}.")
    if command:
        _output.put(f"Run it: {_output.command(command)}")


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
