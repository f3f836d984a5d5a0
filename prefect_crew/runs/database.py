"""The crew database of this process: where it is, and whether it is the one that this Prefect server knows.

One Variable of a Prefect server, `crew_database`, names the store in which its crews are recorded. Prefect creates a
Variable once, so the first process that uses a store with a server registers it there.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import VariableCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import Settings, get_current_settings
from prefect.variables import Variable
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from prefect_crew._internal.prefect_api import lock_here, run_logger
from prefect_crew._internal.prefect_errors import STATUS_ERRORS
from prefect_crew.client._parsing import as_object
from prefect_crew.exceptions import StoreError
from prefect_crew.settings import CrewSettings
from prefect_crew.store.database import Registration, Store, Transaction

P = ParamSpec("P")
T = TypeVar("T")

NAME = "crew_database"
"""The Variable that names the store of a Prefect server."""
FILE = "crew.db"
URL_SETTING = "PREFECT_INTEGRATIONS_CREW_DATABASE_URL"

# One store for each address, for all event loops and threads of the process: two of one SQLite file would only wait for
# each other. And the pairs of a Prefect API and a store that were compared.
_stores: dict[str, Store] = {}
_compared: set[tuple[str | None, str]] = set()
# The last store, with the settings that led to it: reading these takes a millisecond, and a row of a batch asks for
# the store four times.
_last: tuple[Settings, str | None, Store] | None = None


def database_url() -> tuple[str, bool]:
    """Return the URL of the crew database, and whether somebody has set it.

    The default is `crew.db` beside Prefect's own SQLite file, else in Prefect's home.
    """
    if (url := CrewSettings().database_url) is not None:
        return url.get_secret_value(), True
    settings = get_current_settings()
    own = settings.server.database.connection_url
    try:
        prefect_url = make_url(own.get_secret_value() if own is not None else "")
        place = prefect_url.database if prefect_url.drivername.startswith("sqlite") else None
    except ArgumentError:
        place = None
    if place is not None and (":memory:" in place or not place):
        return f"sqlite:///{_temporary_folder()}/{FILE}", False
    folder = settings.home if place is None else Path(place.removeprefix("file:")).expanduser().parent
    return f"sqlite:///{folder / FILE}", False


@cache
def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="prefect-crew-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def find_store() -> Store:
    """Return the crew database of this process without a look at the Prefect server. Raises ConfigurationError."""
    global _last
    now = get_current_settings(), os.environ.get(URL_SETTING)
    if _last is None or _last[0] is not now[0] or _last[1] != now[1]:
        url, _ = database_url()
        _last = (*now, _stores.get(url) or _stores.setdefault(url, Store(url)))
    return _last[2]


async def open_store() -> Store:
    """Return the crew database of this process, after a comparison with the one that the Prefect server knows.

    Raises:
        ConfigurationError: Its URL cannot be used.
        StoreError: It cannot be opened, or the server's crews are recorded in another one.
        PREFECT_ERRORS: The Prefect API cannot be reached.
    """
    store = find_store()
    pair = (get_current_settings().api.url, store.where)
    if pair not in _compared:
        async with lock_here("crew database"):
            if pair not in _compared:
                await _compare(store, has_api=pair[0] is not None)
                _compared.add(pair)
    return store


async def in_store(work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function of the store in a transaction of this process's crew database. Raises as `open_store` does."""
    return await (await open_store()).run(work, *args, **kwargs)


async def _compare(store: Store, *, has_api: bool) -> None:
    own, (_, is_set) = await store.registration(), database_url()
    log = run_logger()
    log.info("Runs are recorded in %s%s.", own.where, "" if own.host is None else ", on this machine only")
    if not has_api:  # a server that Prefect starts for this script is on this machine, and its file beside ours
        return
    try:
        other = await read_registration() or await _register(own)
    except STATUS_ERRORS as error:
        if error.response.status_code not in (401, 403):
            raise
        log.warning(
            "This Prefect server refuses Variables (HTTP %d), so nobody can see whether another machine records the "
            "same crews elsewhere. Set PREFECT_INTEGRATIONS_CREW_DATABASE_URL to the same database everywhere.",
            error.response.status_code,
        )
        return
    if own.is_same(other):
        return
    there = f"{other.where}{'' if other.host is None else f' of host {other.host}'}"
    if is_set:
        _warn(there, own.where)
        return
    raise StoreError(
        f"The crews of this Prefect server are recorded in {there}. Nothing was started or read here. Set "
        "PREFECT_INTEGRATIONS_CREW_DATABASE_URL to a database that all machines share. If that file is gone, run: "
        "prefect-crew database use.",
        operation="registration",
        started="no",
    )


@cache
def _warn(there: str, here: str) -> None:
    """Log once in a process that it uses another store than the Prefect server knows: somebody has set its URL."""
    run_logger().warning("The crews of this Prefect server were recorded in %s; this process uses %s.", there, here)


async def read_registration() -> Registration | None:
    """Return the store that the Prefect server knows, None if it knows none."""
    async with get_client() as client:
        variable = await client.read_variable_by_name(NAME)
    value = as_object(None if variable is None else variable.value)
    if not {"id", "where"} <= value.keys():
        return None
    host = value.get("host")
    return Registration(id=str(value["id"]), where=str(value["where"]), host=None if host is None else str(host))


async def _register(own: Registration) -> Registration:
    """Register a store, unless another process was faster. Return the one that is registered."""
    value = {"id": own.id, "where": own.where, "host": own.host}
    try:
        async with get_client() as client:
            await client.create_variable(VariableCreate(name=NAME, value=value))  # pyright: ignore[reportArgumentType]
    except ObjectAlreadyExists:
        return await read_registration() or own
    return own


async def use_this_store() -> tuple[Registration, Registration | None]:
    """Register this process's store in place of any other. Return it, and the one before."""
    store, before = find_store(), await read_registration()
    own = await store.registration()
    value: Any = {"id": own.id, "where": own.where, "host": own.host}
    await Variable.aset(NAME, value, overwrite=True)
    _compared.clear()
    return own, before


def forget_stores() -> None:
    """Close all crew databases of this process. The next use opens them again: for tests, and before a move."""
    global _last
    _last = None
    for store in [*_stores.values()]:
        store.close()
    _stores.clear()
    _compared.clear()
