"""`prefect-crew serve`: a crew server on this machine. Without any Prefect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.cli.crews import PORT, flag

__all__ = ["serve"]


def serve(
    spec: Annotated[
        str,
        Parameter(name="CREW", help="A bundled crew (travel, echo), a YAML script, or CrewAI code as module:factory."),
    ] = "travel",
    /,
    *,
    host: Annotated[str, Parameter(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, PORT] = 8000,
    token: Annotated[
        str | None, Parameter(help="The bearer token. Left out: that in CREW_TOKEN, else a random one, which is shown.")
    ] = None,
    dialect: Annotated[
        Literal["documented", "union", "live"], Parameter(help="How answers are worded.")
    ] = "documented",
    generation: Annotated[Literal["first", "later"], Parameter(help="How webhook bodies are worded.")] = "first",
    fault: Annotated[
        list[str] | None,
        Parameter(help="Something that goes wrong, such as kickoff:500; may be given again.", negative=()),
    ] = None,
    seed: Annotated[int | None, Parameter(help="Seed of faults that happen at random.")] = None,
    speed: Annotated[float, Parameter(help="The seconds of scripts are divided by it.")] = 1.0,
    journal: Annotated[Path | None, Parameter(help="A file that lets runs survive a restart of the server.")] = None,
    on_crash: Annotated[
        Literal["rerun", "lose"], Parameter(help="What a restart does with runs of the journal that had not ended.")
    ] = "rerun",
    inspect: Annotated[bool, flag("Also answer GET /_test/requests, for tests.")] = False,
    no_stop: Annotated[bool, flag("Leave /stop out, as servers may.")] = False,
    max_runs: Annotated[int | None, Parameter(help="How many runs go on at once; later ones are pending.")] = None,
) -> int:
    """Serve a crew with the API of a deployed one, until Ctrl-C."""
    from prefect_crew.server.serve import serve as serve_until_signalled

    try:
        return serve_until_signalled(
            spec,
            host=host,
            port=port,
            token=token or os.environ.get("CREW_TOKEN") or None,
            dialect=dialect,
            generation=generation,
            faults=fault or (),
            seed=seed,
            speed=speed,
            journal=journal,
            on_crash=on_crash,
            inspect=inspect,
            no_stop=no_stop,
            max_runs=max_runs,
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    except OSError as error:
        if error.filename is not None:  # the journal
            raise
        raise OSError(f"{host}:{port} cannot be listened on: {error.strerror or error}. Try --port 0.") from error
