"""Options that several commands share: the crew, inputs, and what is written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import Parameter

from prefect_crew.cli import _output
from prefect_crew.exceptions import ConfigurationError

if TYPE_CHECKING:
    from prefect_crew.client._client import CrewClient
    from prefect_crew.crew import Crew
    from prefect_crew.store.decision import Attempt


CrewName = Annotated[
    str, Parameter(name="CREW", help="The name of a stored crew, or the crew's URL, with its token in CREW_TOKEN.")
]
CrewOfRun = Annotated[
    str | None,
    Parameter(name="--crew", help="The run's crew, if it is not stored: its URL, or the name of another.", negative=()),
]
Output = Annotated[
    Literal["json"] | None,
    Parameter(name=["--output", "-o"], help="json: write one JSON document to standard output, and nothing else."),
]
Inputs = Annotated[
    list[str] | None, Parameter(name=["--input", "-i"], help="An input, as name=value; can be repeated.")
]
InputFile = Annotated[
    str | None,
    Parameter(
        name=["--input-file", "-f"],
        allow_leading_hyphen=True,
        help="A file of inputs, JSON or YAML; - reads standard input.",
    ),
]
Key = Annotated[
    str | None,
    Parameter(name="--key", help="The idempotency key; on a schedule for example 'daily-{scheduled_start:%Y-%m-%d}'."),
]
Yes = Annotated[bool, Parameter(name=["--yes", "-y"], negative=(), help="Do not ask for confirmation.")]
Pool = Annotated[str | None, Parameter(name=["--pool", "-p"])]


def is_url(crew: str) -> bool:
    """Return whether CREW is a URL: it contains `://`, which the name of a stored crew cannot contain."""
    return "://" in crew


async def load(crew: str) -> Crew:
    """Return the stored crew of this name, or the crew of a URL. Raises ConfigurationError if there is none."""
    from prefect_crew.blocks import DeployedCrew, load_crew

    given = DeployedCrew.model_validate({"url": crew, "token": read_token(crew)}) if is_url(crew) else crew
    loaded_crew = await load_crew(given)
    _output.current.hide(loaded_crew.token.get_secret_value())
    return loaded_crew


async def open_client(crew: str) -> CrewClient:
    """Return a client for a URL, without any Prefect, or for a stored crew."""
    if not is_url(crew):
        return (await load(crew)).client()
    from prefect_crew.client._client import CrewClient

    return CrewClient(crew, read_token(crew))


def read_token(url: str) -> str:
    """Return the token for a URL from CREW_TOKEN, or from a person. Raises ConfigurationError if there is none."""
    token = os.environ.get("CREW_TOKEN")
    if not token and sys.stdin.isatty():
        token = getpass(f"Token of {url} (on the Status tab of the crew's page; it is not shown): ").strip()
    if not token:
        raise ConfigurationError(
            f"There is no token for {url}: set CREW_TOKEN. The token is on the Status tab of the crew's page."
        )
    return _output.current.hide(token)


async def find_crew(attempt: Attempt, crew: str | None) -> Crew | None:
    """Return the crew of a run: that of --crew, else the stored one, None if no stored crew has its name and URL.

    Raises:
        ConfigurationError: The crew of --crew is not the crew of the run.
    """
    if crew is None:
        from prefect_crew.blocks import find_crew as find_stored_crew

        stored_crew = await find_stored_crew(attempt)
        if stored_crew is not None:
            _output.current.hide(stored_crew.token.get_secret_value())
        return stored_crew
    loaded_crew = await load(crew)
    if loaded_crew.url != attempt.crew_url:
        raise ConfigurationError(
            f"Run {attempt.key!r} is of the crew at {attempt.crew_url}, not of {loaded_crew.url}. Give "
            "--crew with the URL of the run."
        )
    return loaded_crew


async def need_crew(attempt: Attempt, crew: str | None) -> Crew:
    """Return the crew of a run. Raises ConfigurationError if --crew has to name it."""
    if (loaded_crew := await find_crew(attempt, crew)) is None:
        raise ConfigurationError(missing_crew(attempt))
    return loaded_crew


def missing_crew(attempt: Attempt) -> str:
    """Return the sentence that asks for the crew of a run."""
    return (
        f"The crew of run {attempt.first_id}, {attempt.crew}, is not stored with the URL {attempt.crew_url}. Give "
        "--crew: that URL, with CREW_TOKEN, or the name of a stored crew."
    )


def read_pairs(option: str, pairs: Sequence[str], value: str = "value") -> dict[str, str]:
    """Return the `name=value` pairs of an option as a dictionary; a value may hold further equals signs.

    Raises:
        ConfigurationError: A text is no such pair, or a name is given twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name.strip():
            raise ConfigurationError(f"{option} {pair!r} does not have the form name={value}.")
        if name in values:
            raise ConfigurationError(f"{option} {name} is given twice.")
        values[name] = text
    return values


def gather_inputs(pairs: Sequence[str] | None, file: str | None) -> dict[str, Any]:
    """Return the inputs of a run from the file (JSON or YAML) and from `name=value` pairs, which win over the file.

    Raises:
        ConfigurationError: A pair has no `=` or repeats a name; the file cannot be read, or holds no object.
    """
    inputs = read_pairs("-i", pairs or ())
    if file is None:
        return inputs
    import yaml

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The inputs in {file} cannot be read: {error}.") from None
    try:
        # JSON first: YAML reads most of it, but not tabs, and it takes some numbers for others.
        value = json.loads(text)
    except ValueError:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigurationError(f"{file} is neither JSON nor YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(value, dict):
        raise ConfigurationError(
            f'{file} holds no inputs: expected one object of names and values, such as {{"topic": "Lisbon"}}.'
        )
    return {**{str(name): item for name, item in cast("dict[Any, Any]", value).items()}, **inputs}
