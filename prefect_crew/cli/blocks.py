"""`prefect-crew save`: store a crew as a Prefect block, with its token."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from getpass import getpass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._errors import reason
from prefect_crew.cli._options import TOKEN_VARIABLE, CrewAccess, flag
from prefect_crew.cli._prefect import reach_prefect
from prefect_crew.cli._progress import progress
from prefect_crew.exceptions import AuthenticationError, ConfigurationError, CrewError

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew
    from prefect_crew.client.models import CrewInput


def save(
    name: Annotated[str, Parameter(name="NAME", help="The block's name: lower-case letters, digits and dashes.")],
    /,
    *,
    url: Annotated[str, Parameter(help="The crew's base URL, from the Status tab of its page.")],
    token: Annotated[
        str | None, Parameter(help="Its token. Left out: that in CREW_TOKEN, else it is asked for.")
    ] = None,
    allow_http: Annotated[bool, flag("Allow plain http beyond this machine.")] = False,
    request_timeout: Annotated[float | None, Parameter(help="Seconds that one request may take.")] = None,
    timeout: Annotated[float | None, Parameter(help="Seconds that a run may take, pending and running.")] = None,
    human_timeout: Annotated[float | None, Parameter(help="Seconds that people may take to answer.")] = None,
    inputs_as_json: Annotated[bool, flag("Send JSON values instead of text.")] = False,
    allow_extra: Annotated[bool, flag("Send inputs that the crew does not name, too.")] = False,
    max_kickoffs: Annotated[
        int | None, Parameter(help="How many runs may be bought under one idempotency key.")
    ] = None,
    concurrency_limit: Annotated[str | None, Parameter(help="The Prefect concurrency limit of its runs.")] = None,
    show: Annotated[
        Literal["full", "summary", "none"] | None, Parameter(help="How much artifacts show of inputs and outputs.")
    ] = None,
    secret_input: Annotated[
        list[str] | None, Parameter(help="An input whose value is masked; may be given again.", negative=())
    ] = None,
    price: Annotated[float | None, Parameter(help="What one run costs.")] = None,
    overwrite: Annotated[bool, flag("Replace the block of this name.")] = False,
) -> None:
    """Store a crew as a Prefect block, so that its name is all that flows and commands need."""
    access = CrewAccess(token=_token(url, token), allow_http=allow_http)
    given: dict[str, Any] = {
        "request_timeout": request_timeout,
        "inputs_as_json": inputs_as_json,
        "allow_extra_inputs": allow_extra,
        "max_kickoffs": max_kickoffs,
        "concurrency_limit": concurrency_limit,
        "show": show,
        "secret_inputs": secret_input,
        "price": price,
    }
    fields = {field: value for field, value in given.items() if value is not None}
    patience = {"timeout": timeout, "human_timeout": human_timeout}
    if any(value is not None for value in patience.values()):
        fields["wait"] = {field: value for field, value in patience.items() if value is not None}
    block = access.of_url(url, **fields)
    with progress(quiet=True) as shown:
        reach_prefect(shown)
    found = asyncio.run(_try_out(name, access, url))
    asyncio.run(_save(block, name, overwrite=overwrite))
    _output.put(f"Stored crew {name} ({block.url}) as the block deployed-crew/{name}.")
    if isinstance(found, CrewError):
        _output.note(f"It could not be asked for its inputs: {found}", "yellow")
        return
    options = " ".join(f"-i {shlex.quote(item.name)}=…" for item in found if item.required)
    _output.put(f"Run it: {_output.command(f'prefect-crew run {shlex.quote(name)} {options}'.strip())}")


async def _save(block: DeployedCrew, name: str, *, overwrite: bool) -> None:
    try:
        await block.asave(name, overwrite=overwrite)
    except ValueError as error:
        if "already in use" in str(error):
            raise ConfigurationError(f"There is a crew {name!r} already. Give --overwrite to replace it.") from None
        raise ConfigurationError(f"The block {name!r} was not stored: {reason(error)}") from None


def _token(url: str, token: str | None) -> str:
    token = token or os.environ.get(TOKEN_VARIABLE)
    if not token and sys.stdin.isatty():
        token = getpass(f"Token of {url} (the Status tab of its page; not shown): ").strip()
    if not token:
        raise ConfigurationError(
            f"No token for {url}: set {TOKEN_VARIABLE} or give --token. It stands on the Status tab of the crew's page."
        )
    return token


async def _try_out(name: str, access: CrewAccess, url: str) -> list[CrewInput] | CrewError:
    """Return what the crew takes, or why it does not say so now: it can be stored all the same.

    Raises:
        AuthenticationError: It refuses the token, which no run could use either.
    """
    try:
        async with access.client(url) as client:
            return await client.inputs()
    except AuthenticationError:
        _output.note(f"The block {name} was not stored: the crew's server refused the token.")
        raise
    except CrewError as error:
        return error
