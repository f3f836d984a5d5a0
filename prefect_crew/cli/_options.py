"""Options that several commands share: the crew, its token, inputs, and what is written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._errors import reason
from prefect_crew.client.encoding import encode_inputs
from prefect_crew.exceptions import ConfigurationError

if TYPE_CHECKING:
    from prefect_crew.blocks import DeployedCrew
    from prefect_crew.client._client import CrewClient
    from prefect_crew.crew import Crew, WaitPolicy
    from prefect_crew.store.decision import Attempt


CrewName = Annotated[str, Parameter(name="CREW", help="The name of a stored crew, or the crew's URL.")]
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
Timeout = Annotated[
    float | None, Parameter(name="--timeout", help="Seconds that a run may take, pending and running together.")
]
Yes = Annotated[bool, Parameter(name=["--yes", "-y"], help="Do not ask for confirmation.")]
Pool = Annotated[str | None, Parameter(name=["--pool", "-p"])]


def is_url(crew: str) -> bool:
    """Return whether CREW is a URL: it contains `://`, which the name of a stored crew cannot contain."""
    return "://" in crew


@Parameter(name="*")
@dataclass(frozen=True)
class CrewAccess:
    """The access to a crew that is given as a URL. A stored crew brings its own."""

    token_file: Annotated[
        Path | None,
        Parameter(
            env_var="CREW_TOKEN_FILE",
            help="A file that holds the token for a URL; left out, CREW_TOKEN is it, or it is asked for.",
        ),
    ] = None
    allow_http: Annotated[
        bool, Parameter(help="Send the token to a URL over http, without encryption, beyond this machine.")
    ] = False

    def block(self, url: str, **fields: Any) -> DeployedCrew:
        """Return an unsaved block for a URL. This imports Prefect, but calls no API."""
        from pydantic import SecretStr, ValidationError

        from prefect_crew.blocks import DeployedCrew

        try:
            return DeployedCrew(url=url, token=SecretStr(self.read_token(url)), allow_http=self.allow_http, **fields)
        except ValidationError as error:
            raise ConfigurationError(reason(error)) from None

    async def load(self, crew: str) -> Crew:
        """Return the stored crew of this name, from the Prefect API, or the crew of a URL.

        Raises:
            ConfigurationError: There is no such crew.
        """
        from prefect_crew.blocks import load_crew

        if is_url(crew):
            return await load_crew(self.block(crew))
        try:
            loaded_crew = await load_crew(crew)
        except ConfigurationError:
            raise
        except ValueError as error:
            raise ConfigurationError(f"The block {crew!r} cannot be loaded: {reason(error)}") from None
        _output.current.hide(loaded_crew.token.get_secret_value())
        return loaded_crew

    async def client(self, crew: str) -> CrewClient:
        """Return a client for a URL, without any Prefect, or for a stored crew."""
        if not is_url(crew):
            return (await self.load(crew)).client()
        from prefect_crew.client._client import CrewClient

        return CrewClient(crew, self.read_token(crew), allow_http=self.allow_http)

    @property
    def has_token(self) -> bool:
        """Whether a token is given, so that nobody is asked for one."""
        return bool(os.environ.get("CREW_TOKEN")) or self.token_file is not None

    def read_token(self, url: str) -> str:
        """Return the token for a URL: from a file, the environment, or a person.

        Raises:
            ConfigurationError: There is none.
        """
        token = os.environ.get("CREW_TOKEN")
        if self.token_file is not None:
            token = read_text(self.token_file, "token").strip()
        elif not token and sys.stdin.isatty():
            with _output.asking():
                token = getpass(f"Token of {url} (on the Status tab of the crew's page; it is not shown): ").strip()
        if not token:
            raise ConfigurationError(
                f"There is no token for {url}: set CREW_TOKEN, or give --token-file. The token is on the Status tab of "
                "the crew's page."
            )
        return _output.current.hide(token)


@Parameter(name="*")
@dataclass(frozen=True)
class CrewOfRun(CrewAccess):
    """The crew of a run: the crew of --crew, else the stored crew."""

    crew: Annotated[
        str | None, Parameter(help="The run's crew, if it is not stored: its URL, or the name of another.")
    ] = None

    async def find(self, attempt: Attempt) -> Crew | None:
        """Return the crew of a run. Without --crew: None if no stored crew has its name and URL.

        Raises:
            ConfigurationError: The crew of --crew is not the crew of the run.
        """
        try:
            loaded_crew = await self.load(self.crew or attempt.crew)
        except ConfigurationError:
            if self.crew is not None:
                raise
            return None
        if loaded_crew.url == attempt.crew_url:
            return loaded_crew
        if self.crew is None:
            return None
        raise ConfigurationError(
            f"Run {attempt.key!r} is of the crew at {attempt.crew_url}, not of {loaded_crew.url}. Give "
            "--crew with the URL of the run."
        )

    async def need(self, attempt: Attempt) -> Crew:
        """Return the crew of a run. Raises ConfigurationError if --crew has to name it."""
        loaded_crew = await self.find(attempt)
        if loaded_crew is None:
            raise ConfigurationError(self.missing(attempt))
        return loaded_crew

    @staticmethod
    def missing(attempt: Attempt) -> str:
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
        ConfigurationError: A pair has no `=` or repeats a name; the file cannot be read, or holds no object; or a
            value cannot be sent.
    """
    inputs = read_pairs("-i", pairs or ())
    if file is None:
        return inputs
    import yaml

    text = read_text(Path(file), "inputs")
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
    inputs = {**{str(name): item for name, item in cast("dict[Any, Any]", value).items()}, **inputs}
    try:
        encode_inputs(inputs, as_json=True)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{error} Nothing was started.") from None
    return inputs


def read_text(file: Path, content: str) -> str:
    """Return the text of a file, - is standard input. Raises ConfigurationError if it cannot be read as UTF-8."""
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The {content} in {file} cannot be read: {error}.") from None


def wait_policy(crew: Crew, timeout: float | None) -> WaitPolicy | None:
    """Return the crew's wait policy with this timeout in seconds, None without a timeout. Raises ConfigurationError."""
    if timeout is None:
        return None
    from pydantic import ValidationError

    from prefect_crew.crew import WaitPolicy

    try:
        return WaitPolicy.model_validate({**dict(crew.wait), "timeout": timeout})  # model_copy checks nothing
    except ValidationError as error:
        raise ConfigurationError(f"{reason(error)} Nothing was started.") from None
