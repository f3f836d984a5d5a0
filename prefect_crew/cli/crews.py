"""The command `crews save`: crews that are stored as Prefect blocks, with their tokens."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from cyclopts import App, Parameter
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from prefect_crew.blocks import DeployedCrew
from prefect_crew.cli import _output
from prefect_crew.cli._errors import reason
from prefect_crew.cli._options import read_token
from prefect_crew.exceptions import AuthenticationError, ConfigurationError, CrewError

app = App(name="crews")
Name = Annotated[str, Parameter(name="NAME", help="The crew's name: lower-case letters, digits and dashes.")]


@Parameter(name="*")
@dataclass(frozen=True)
class BlockFields:
    """Fields of the block, with the block's names. A field that is left out has the block's default.

    Args:
        url: The crew's URL, from the Status tab of its page.
        flow: It is a Flow: no input is required, and inputs keep their JSON types.
        max_attempts: How many runs one idempotency key may start.
        concurrency_limit: How many of its runs may be in flight.
        show: How much artifacts show of inputs and outputs.
        secret_inputs: An input whose value is hidden; can be repeated.
        price: The price of one run.
        allow_http: Send the token to a URL over http, without encryption, beyond this machine.
    """

    url: str | None = None
    flow: bool | None = None
    max_attempts: int | None = None
    concurrency_limit: int | None = None
    show: Literal["full", "summary", "none"] | None = None
    secret_inputs: Annotated[list[str] | None, Parameter(name="--secret-input")] = None
    price: float | None = None
    allow_http: bool | None = None


@app.command
async def save(name: Name, /, *, fields: BlockFields = BlockFields(), overwrite: bool = False) -> None:
    """Store a crew as a Prefect block, so that flows and commands need only its name.

    Its token is CREW_TOKEN, or the command asks for it. --overwrite changes a stored crew and keeps fields that are
    left out; alone, it renews the token. Further fields are on the block's page.

    Args:
        overwrite: Change the stored crew of this name.
    """
    changes = {field: value for field, value in vars(fields).items() if value is not None}
    stored = await _read_stored(name) if overwrite else {}
    values = {**stored, **changes}
    if "url" not in values:
        raise ConfigurationError(
            f"Give --url for a new crew {name!r}. If a crew of that name is stored already, give --overwrite."
        )
    # The stored token belongs to the stored URL alone. Without any other change a new token is meant.
    if os.environ.get("CREW_TOKEN") or not changes or values["url"].rstrip("/") != stored.get("url"):
        values["token"] = read_token(values["url"])
    _output.current.hide(values["token"])
    block: DeployedCrew = DeployedCrew.model_validate(values)
    try:
        async with block.client() as client:
            inputs = await client.inputs()
        options = [f"-i {shlex.quote(item.name)}=…" for item in inputs if item.required]
        then = f"Run it: {' '.join(['prefect-crew run', shlex.quote(name), *options])}"
    except AuthenticationError:
        _output.note(f"The crew {name} was not stored: its server refused the token.")
        raise
    except CrewError as error:
        _output.note(f"The crew could not be asked for its inputs, and is stored anyway: {error}", "yellow")
        then = f"Once its URL is right or its server answers, run: prefect-crew doctor {shlex.quote(name)}"
    await _store(name, block, overwrite=overwrite)
    _output.put(f"Stored crew {name} ({block.url}) as the block deployed-crew/{name}.")
    _output.put(then)


async def save_served(name: str, url: str, token: str, *, is_flow: bool) -> None:
    """Store a crew that the dev server serves, and keep its other stored fields.

    Raises:
        ConfigurationError: The stored crew of this name is not on this machine, or cannot be stored.
    """
    stored = await _read_stored(name)
    if stored and urlsplit(str(stored["url"])).hostname not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigurationError(
            f"The crew {name!r} is stored with the URL {stored['url']}, which is not on this machine. The served crew "
            "did not replace it. Give --save another name."
        )
    block: DeployedCrew = DeployedCrew.model_validate({**stored, "url": url, "token": token, "flow": is_flow})
    await _store(name, block, overwrite=True)


async def _read_stored(name: str) -> dict[str, Any]:
    """Return the unchecked fields of a stored crew, with its token; none if there is no such crew."""
    async with get_client() as client:
        try:
            document = await client.read_block_document_by_name(name, "deployed-crew")
        except ObjectNotFound:
            return {}
    return {field: value for field, value in document.data.items() if field in DeployedCrew.model_fields}


async def _store(name: str, block: DeployedCrew, *, overwrite: bool) -> None:
    try:
        await block.asave(name, overwrite=overwrite)
    except ValueError as error:
        if "already in use" in str(error):
            raise ConfigurationError(
                f"A crew {name!r} is stored already. Give --overwrite to change it; fields that you leave out stay as "
                "they are."
            ) from None
        raise ConfigurationError(f"The crew {name!r} was not stored: {reason(error)}") from None
