"""The commands `crews`: crews that are stored as Prefect blocks, with their tokens."""

from __future__ import annotations

import shlex
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from cyclopts import App, Parameter
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError

from prefect_crew.blocks import DeployedCrew
from prefect_crew.cli import _output
from prefect_crew.cli._errors import reason
from prefect_crew.cli._options import CrewAccess, Output, Timeout
from prefect_crew.exceptions import AuthenticationError, ConfigurationError, CrewError

app = App(name="crews")
Name = Annotated[str, Parameter(name="NAME", help="The crew's name: lower-case letters, digits and dashes.")]


@Parameter(name="*")
@dataclass(frozen=True)
class BlockFields:
    """Fields of the block, with the block's names. A field that is left out has the block's default.

    Args:
        flow: It is a Flow: no input is required, and inputs keep their JSON types.
        allow_extra_inputs: Also send inputs that the crew does not name.
        max_attempts: How many runs one idempotency key may start.
        concurrency_limit: How many of its runs may be in flight.
        show: How much artifacts show of inputs and outputs.
        secret_inputs: An input whose value is hidden; can be repeated.
        price: The price of one run.
        page_url: The crew's page for people, to which artifacts link.
    """

    flow: bool | None = None
    allow_extra_inputs: Annotated[bool | None, Parameter(name="--allow-extra")] = None
    max_attempts: int | None = None
    concurrency_limit: int | None = None
    show: Literal["full", "summary", "none"] | None = None
    secret_inputs: Annotated[list[str] | None, Parameter(name="--secret-input")] = None
    price: float | None = None
    page_url: str | None = None


@app.command
def save(
    name: Name,
    /,
    *,
    url: str | None = None,
    access: CrewAccess = CrewAccess(),
    fields: BlockFields = BlockFields(),
    timeout: Timeout = None,
    human_timeout: float | None = None,
    overwrite: bool = False,
) -> Coroutine[Any, Any, None]:
    """Store a crew as a Prefect block, so that flows and commands need only its name.

    Without a token, the command asks for it. --overwrite changes a stored crew and keeps fields that are left out;
    alone, it renews the token.

    Args:
        url: The crew's URL, from the Status tab of its page.
        human_timeout: Seconds that people may take to answer.
        overwrite: Change the stored crew of this name.
    """
    wait = _without_none({"timeout": timeout, "human_timeout": human_timeout})
    changes = _without_none({"url": url, **vars(fields), "wait": wait or None})
    if overwrite:
        return _change(name, access, changes)
    # The command names a mistake in the fields before it reaches Prefect.
    return _save(name, _new_block(name, access, changes), overwrite=False)


def _new_block(name: str, access: CrewAccess, fields: dict[str, Any]) -> DeployedCrew:
    if "url" not in fields:
        raise ConfigurationError(
            f"Give --url for a new crew {name!r}. If a crew of that name is stored already, give --overwrite."
        )
    return access.block(**fields)


async def _change(name: str, access: CrewAccess, changes: dict[str, Any]) -> None:
    stored = await _read_stored(name)
    if stored is None:
        await _save(name, _new_block(name, access, changes), overwrite=True)
        return
    url = str(changes.get("url", stored["url"]))
    fields: dict[str, Any] = {**stored, **changes, "wait": {**(stored.get("wait") or {}), **changes.get("wait", {})}}
    # The stored token belongs to the stored URL alone. Without any other change a new token is meant.
    if access.has_token or not changes or url.rstrip("/") != stored["url"]:
        fields["token"] = access.read_token(url)
    else:
        _output.current.hide(fields["token"])
    fields["allow_http"] = access.allow_http or stored.get("allow_http", False)
    try:
        block: DeployedCrew = DeployedCrew.model_validate(fields)
    except ValidationError as error:
        raise ConfigurationError(
            f"The crew {name!r} was not changed: {reason(error)} Give that field, correct it on Prefect's page, or "
            f"delete the crew and store it again: prefect block delete deployed-crew/{name}."
        ) from None
    await _save(name, block, overwrite=True)
    unchanged = [
        field for field in _set_fields(block) if field not in {*changes, "url", "token", "allow_http"} - {"wait"}
    ]
    if unchanged:
        _output.put(f"Kept as they were: {', '.join(unchanged)}.")


def _set_fields(block: DeployedCrew) -> list[str]:
    """Return the names of the fields whose values are not the defaults."""
    defaults = {name: field.get_default(call_default_factory=True) for name, field in DeployedCrew.model_fields.items()}
    return [name for name, default in defaults.items() if getattr(block, name) != default]


async def save_served(name: str, url: str, token: str, *, is_flow: bool) -> None:
    """Store a crew that the dev server serves, and keep its other stored fields.

    Raises:
        ConfigurationError: The stored crew of this name is not on this machine, or cannot be stored.
    """
    stored = await _read_stored(name) or {}
    if stored and urlsplit(str(stored["url"])).hostname not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigurationError(
            f"The crew {name!r} is stored with the URL {stored['url']}, which is not on this machine. The served crew "
            "did not replace it. Give --save another name."
        )
    try:
        block: DeployedCrew = DeployedCrew.model_validate({**stored, "url": url, "token": token, "flow": is_flow})
        await block.asave(name, overwrite=True)
    except ValueError as error:
        raise ConfigurationError(f"The crew {name!r} was not stored: {reason(error)}") from None


async def _read_stored(name: str) -> dict[str, Any] | None:
    """Return the unchecked fields of a stored crew, with its token; None if there is no such crew."""
    async with get_client() as client:
        try:
            document = await client.read_block_document_by_name(name, "deployed-crew")
        except ObjectNotFound:
            return None
    return {field: value for field, value in document.data.items() if field in DeployedCrew.model_fields}


async def _save(name: str, block: DeployedCrew, *, overwrite: bool) -> None:
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
    try:
        await block.asave(name, overwrite=overwrite)
    except ValueError as error:
        if "already in use" in str(error):
            raise ConfigurationError(
                f"A crew {name!r} is stored already. Give --overwrite to change it; fields that you leave out stay as "
                "they are."
            ) from None
        raise ConfigurationError(f"The crew {name!r} was not stored: {reason(error)}") from None
    _output.put(f"Stored crew {name} ({block.url}) as the block deployed-crew/{name}.")
    _output.put(then)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@app.command
async def ls(*, output: Output = None) -> None:
    """List the stored crews, and with -o json all their fields but the token.

    To delete one: prefect block delete deployed-crew/NAME.
    """
    async with get_client() as client:
        try:
            documents = await client.read_block_documents_by_type("deployed-crew", include_secrets=False)
        except ObjectNotFound:  # the block type is not registered: no crew was ever stored
            documents = []
    crews: list[dict[str, Any]] = []
    for document in sorted(documents, key=lambda block_document: str(block_document.name)):
        try:
            block: DeployedCrew = DeployedCrew.model_validate(document.data)
        except ValidationError as error:
            crews.append({"name": document.name, "problem": reason(error)})
            continue
        crews.append({"name": document.name, **block.model_dump(mode="json", exclude={"token"})})
    rows = [(crew["name"], crew.get("problem") or crew["url"]) for crew in crews]
    empty = "No crew is stored. Run: prefect-crew crews save NAME --url URL."
    _output.put_rows(("Crew", "URL"), rows, empty=empty, json=output and crews)
