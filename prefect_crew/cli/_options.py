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

from cyclopts import Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._errors import UsageError, reason
from prefect_crew.client.inputs import encode_inputs
from prefect_crew.exceptions import ConfigurationError

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew
    from prefect_crew.client._client import CrewClient
    from prefect_crew.crew import Crew, WaitPolicy


CREW = Parameter(name="CREW", help="The name of a stored block, or the crew's URL.")
CREW_OF_RUN = Parameter(help="The crew, where its block is not stored under the name on record: a block or a URL.")
JSON = Parameter(help="Write one JSON document to standard output, and nothing else.")
INPUT = Parameter(name=["--input", "-i"], help="An input, as name=value; may be given again.")
INPUT_FILE = Parameter(name="--inputs", help="A file of inputs, JSON or YAML; - reads standard input.")
KEY = Parameter(help="The idempotency key of the run; of a schedule such as 'daily-{{ scheduled_start:%Y-%m-%d }}'.")
OUTPUT_FILE = Parameter(help="Also write the result's text to this file.")
TOKEN = Parameter(
    help="The token for a URL. Others on this machine may see it here: prefer the variable.", env_var="CREW_TOKEN"
)


def is_url(crew: str) -> bool:
    """Return whether CREW is a URL and not a block's name, which has no such signs in it."""
    return "://" in crew


def no_token(url: str) -> ConfigurationError:
    """Return the error that a crew given as a URL has no token."""
    return ConfigurationError(
        f"No token for {url}: set CREW_TOKEN or give --token. It stands on the Status tab of the crew's page."
    )


@Parameter(name="*")
@dataclass(frozen=True)
class CrewAccess:
    """How a crew that is given as a URL is reached. A block brings all of it."""

    token: Annotated[str | None, TOKEN] = None
    allow_http: Annotated[bool, Parameter(help="Send the token to a URL over plain http beyond this machine.")] = False

    def client(self, url: str) -> CrewClient:
        """Return a client for a URL, without any Prefect."""
        from prefect_crew.client._client import CrewClient

        return CrewClient(url, self._token(url), allow_http=self.allow_http)

    def block(self, url: str, **fields: Any) -> DeployedCrew:
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
            return self.block(crew).crew
        if self.token not in (None, os.environ.get("CREW_TOKEN")):
            raise UsageError(f"--token goes with a URL; {crew!r} is a block's name, and the block holds its token.")
        from prefect_crew.blocks import load_crew

        try:
            found = await load_crew(crew)
        except ConfigurationError:
            raise ConfigurationError(
                f"No crew is stored under the name {crew!r}. Store it: prefect-crew save {shlex.quote(crew)} --url "
                "URL. Or give the crew's URL in its place, with CREW_TOKEN."
            ) from None
        except ValueError as error:
            raise ConfigurationError(f"The block {crew!r} cannot be loaded: {reason(error)}") from None
        _output.current.hide(found.token.get_secret_value())
        return found

    async def any_client(self, crew: str) -> CrewClient:
        """Return a client for a URL or a block."""
        return self.client(crew) if is_url(crew) else (await self.load(crew)).client()

    def _token(self, url: str) -> str:
        if not self.token:
            raise no_token(url)
        return _output.current.hide(self.token)


def reach_for(crew: str) -> None:
    """Make sure of the Prefect API where CREW is a block's name; a URL needs none."""
    if not is_url(crew):
        from prefect_crew.cli._prefect import reach_prefect

        reach_prefect()


def read_pairs(pairs: Sequence[str], value: str = "value") -> dict[str, str]:
    """Return `name=value` pairs as a dictionary; a value may hold further equals signs.

    Raises:
        UsageError: One is no such pair, or a name is given twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"-i {pair!r}: give an input as name={value}.")
        if name in found:
            raise UsageError(f"-i {name}: this input is given twice.")
        found[name] = text
    return found


def gather_inputs(pairs: Sequence[str], file: str | None) -> dict[str, Any]:
    """Return the inputs of a run: those of the file, with those of the pairs laid over them.

    Args:
        pairs: `name=value`; the value is text as it is.
        file: JSON or YAML holding one object; `-` reads standard input.

    Raises:
        UsageError: A pair is none.
        ConfigurationError: The file cannot be read, or holds no object, or a value cannot be sent.
    """
    inputs = {**({} if file is None else _read(file)), **read_pairs(pairs)}
    try:
        encode_inputs(inputs, as_json=True)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{error} Nothing was started.") from None
    return inputs


def _read(file: str) -> dict[str, Any]:
    import yaml

    text = sys.stdin.read() if file == "-" else read_text(Path(file), "inputs")
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
    return {str(name): item for name, item in cast("dict[Any, Any]", value).items()}


def read_text(file: Path, what: str) -> str:
    """Return the text of a file.

    Raises:
        ConfigurationError: It cannot be read, or is not text in UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The {what} in {file} cannot be read: {error}.") from None


def wait_policy(crew: Crew, timeout: float) -> WaitPolicy:
    """Return the crew's way to wait, with the command's timeout in seconds.

    Raises:
        ConfigurationError: It is none.
    """
    from pydantic import ValidationError

    from prefect_crew.crew import WaitPolicy

    try:
        # Not model_copy, which checks nothing.
        return WaitPolicy.model_validate({**crew.wait.model_dump(), "timeout": timeout})
    except ValidationError as error:
        raise ConfigurationError(f"{reason(error)} Nothing was started.") from None
