"""Where a batch's ledger is, as its caller says it and as others find it again: never with a password."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from prefect.blocks.system import Secret
from sqlalchemy import URL

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.batches.database import default_ledger, open_url

__all__ = ["SECRET", "LedgerPlace", "ledger_place"]

_HARMLESS = {"ssl", "sslmode", "host", "port", "target_session_attrs", "application_name", "connect_timeout"}
"""Options of a URL that hold no secret. asyncpg also takes `password`, `passfile`, `sslpassword` and any `options`."""
SECRET = "secret://"  # noqa: S105  the beginning of a name, not a secret


@dataclass(frozen=True)
class LedgerPlace:
    """A ledger. `ledger` is its path or URL, with what it takes to open it; `told` is the same without a password."""

    ledger: str
    told: str

    def __repr__(self) -> str:
        return f"LedgerPlace({self.told!r})"

    @property
    def local(self) -> bool:
        """Whether it is a file on this machine."""
        return open_url(self.ledger).drivername == "sqlite"

    @property
    def exists(self) -> bool:
        """Whether a ledger that is a file is there."""
        return self.local and Path(str(open_url(self.ledger).database)).exists()

    @property
    def open_to_all(self) -> bool:
        """Whether `told` is all that another machine needs."""
        return self.told.startswith(SECRET) or not _is_secret(open_url(self.ledger))


async def ledger_place(ledger: str | None, output: str) -> LedgerPlace:
    """Return where a ledger is.

    Args:
        ledger: A path, the URL of a PostgreSQL database, `secret://NAME` for a Prefect Secret block that holds one of
            them, or None for a file beside the output.
        output: Where the lines go.

    Raises:
        ConfigurationError: There is no such block, or no place beside the output.
    """
    given = ledger or default_ledger(output)
    if not given.startswith(SECRET):
        url = open_url(given)
        told = str(url.database) if url.drivername == "sqlite" else given
        if _is_secret(url):
            told = url.set(drivername="postgresql", password=None, query={}).render_as_string()
        return LedgerPlace(given, told)
    name = given.removeprefix(SECRET)
    try:
        block = await cast("Any", Secret).aload(name)
    except ValueError:
        raise ConfigurationError(
            f"The ledger is said to be in the Prefect Secret block {name!r}, which does not exist. Make it: "
            f"Secret(value='postgresql://…').save({name!r})."
        ) from None
    value = block.get()
    if not isinstance(value, str):
        raise ConfigurationError(f"The Prefect Secret block {name!r} holds no text, and so no ledger.")
    open_url(value)
    return LedgerPlace(value, given)


def _is_secret(url: URL) -> bool:
    """Return whether a URL holds what is not for everyone: a password, or an option that may."""
    return url.password is not None or any(name.lower() not in _HARMLESS for name in url.query)
