"""Options that several commands share: the crew, its token, inputs."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Parameter, validators

from prefect_crew.cli import _output
from prefect_crew.cli._errors import UsageError, reason
from prefect_crew.exceptions import ConfigurationError

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew
    from prefect_crew.client._client import CrewClient
    from prefect_crew.crew import Crew


def flag(text: str, *, name: str | None = None) -> Parameter:
    """Return the parameter of a switch that is off unless it is given."""
    return Parameter(name=name, help=text, negative=(), show_default=False)


CREW = Parameter(name="CREW", help="The name of a stored block, or the crew's URL.")
JSON = flag("Write one JSON document to standard output, and nothing else.")
PORT = Parameter(help="The port; 0 takes a free one.", validator=validators.Number(gte=0, lte=65535))
TOKEN_VARIABLE = "CREW_TOKEN"  # noqa: S105 - the name of a variable, not a token


def is_url(crew: str) -> bool:
    """Return whether CREW is a URL and not a block's name, which has no such signs in it."""
    return "://" in crew


@Parameter(name="*")
@dataclass
class CrewAccess:
    """How a crew that is given as a URL is reached. A block brings all of it."""

    token: Annotated[
        str | None, Parameter(help="The token for a URL. Others on this machine may see it here: prefer CREW_TOKEN.")
    ] = None
    allow_http: Annotated[bool, flag("Send the token to a URL over plain http beyond this machine.")] = False

    def _token(self, crew: str) -> str:
        token = self.token or os.environ.get(TOKEN_VARIABLE)
        if not token:
            raise ConfigurationError(
                f"No token for {crew}: set {TOKEN_VARIABLE} or give --token. It stands on the Status tab of the "
                "crew's page."
            )
        return _output.secret(token)

    def client(self, url: str) -> CrewClient:
        """Return a client for a URL, without any Prefect."""
        from prefect_crew.client._client import CrewClient

        return CrewClient(url, self._token(url), allow_http=self.allow_http)

    def of_url(self, url: str, **fields: Any) -> DeployedCrew:
        """Return an unsaved block for a URL. This imports Prefect, and asks nothing."""
        from pydantic import SecretStr, ValidationError

        from prefect_crew.blocks import DeployedCrew

        try:
            return DeployedCrew(url=url, token=SecretStr(self._token(url)), allow_http=self.allow_http, **fields)
        except ValidationError as error:
            raise ConfigurationError(reason(error)) from None

    async def load(self, crew: str) -> Crew:
        """Return the crew of the block of this name, from the Prefect API, or of a URL.

        Raises:
            ConfigurationError: There is none.
        """
        if is_url(crew):
            return self.of_url(crew).crew
        if self.token is not None:
            raise UsageError(f"--token goes with a URL; {crew!r} is a block's name, and the block holds its token.")
        from prefect_crew.blocks import load_crew

        try:
            found = await load_crew(crew)
        except ConfigurationError:
            raise ConfigurationError(
                f"No crew is stored under the name {crew!r}. Store it: "
                f"prefect-crew save {shlex.quote(crew)} --url URL. "
                "Or give the crew's URL in its place, with CREW_TOKEN."
            ) from None
        except ValueError as error:
            raise ConfigurationError(f"The block {crew!r} cannot be loaded: {reason(error)}") from None
        _output.secret(found.token.get_secret_value())
        return found


def find(crew: str) -> None:
    """Make sure of the Prefect API where CREW is a block's name; a URL needs none."""
    if not is_url(crew):
        from prefect_crew.cli._prefect import reach_prefect
        from prefect_crew.cli._progress import progress

        with progress(quiet=True) as shown:
            reach_prefect(shown)


def gather_inputs(pairs: Sequence[str], file: str | None) -> dict[str, Any]:
    """Return the inputs of a run: those of the file, with those of the pairs laid over them.

    Args:
        pairs: `name=value`; the value is text as it is, with all further equals signs.
        file: JSON or YAML holding one object; `-` reads standard input.

    Raises:
        UsageError: A pair is none, or names an input a second time.
        ConfigurationError: The file cannot be read, or holds no object, or a value cannot be sent.
    """
    given = {} if file is None else _read(file)
    named: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"-i {pair!r}: give an input as name=value.")
        if name in named:
            raise UsageError(f"-i {name}: this input is given twice.")
        named[name] = value
    inputs = {**given, **named}
    from prefect_crew.client.inputs import encode_inputs

    try:
        encode_inputs(inputs, as_json=True)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{error} Nothing was started.") from None
    return inputs


def _read(file: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"The inputs in {file} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"The inputs in {file} cannot be read: it is not text in UTF-8.") from None
    value = _parse(file, text)
    if not isinstance(value, dict):
        raise ConfigurationError(
            f'{file} holds no inputs: expected one object of names and values, such as {{"topic": "Lisbon"}}.'
        )
    return {str(name): item for name, item in cast("dict[Any, Any]", value).items()}


def _parse(file: str, text: str) -> Any:
    import yaml

    try:
        # JSON first: YAML reads most of it, but not tabs, and it takes some numbers for others.
        return json.loads(text)
    except ValueError as error:
        if file.lower().endswith(".json"):
            raise ConfigurationError(f"{file} is not JSON: {error}.") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigurationError(f"{file} is neither JSON nor YAML: {problem}.") from None
