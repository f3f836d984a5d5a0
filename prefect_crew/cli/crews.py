"""CREW on the command line: the name of a stored block, or a URL with a token."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.cli import terminal
from prefect_crew.cli.exits import UsageError, reason

if TYPE_CHECKING:
    from prefect_crew.api.client import CrewClient
    from prefect_crew.blocks import DeployedCrew
    from prefect_crew.crew import Crew

__all__ = ["CREW", "JSON", "PORT", "TOKEN_VARIABLE", "CrewAccess", "find", "flag", "is_url"]


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
        return terminal.secret(token)

    def client(self, url: str) -> CrewClient:
        """Return a client for a URL, without any Prefect."""
        from prefect_crew.api.client import CrewClient

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
        terminal.secret(found.token.get_secret_value())
        return found


def find(crew: str) -> None:
    """Make sure of the Prefect API where CREW is a block's name; a URL needs none."""
    if not is_url(crew):
        from prefect_crew.cli.prefect_side import reach_prefect
        from prefect_crew.cli.progress import progress

        with progress(quiet=True) as shown:
            reach_prefect(shown)
