"""A site for the session: a Prefect server of its own with everything deployed, and one worker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.prefect_server import PrefectServer
from support.site import Site
from support.workers import Worker


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, prefect_template: Path | None) -> Iterator[Site]:
    """Everything deployed on a server of its own."""
    folder = tmp_path_factory.mktemp("site")
    with PrefectServer(folder, template=prefect_template) as server, Site(server, folder) as site:
        yield site


@pytest.fixture(autouse=True)
def own_crew_database(request: pytest.FixtureRequest, crew_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test on the site shares the crew database of its processes; any other has one of its own."""
    if "site" in request.fixturenames:
        site: Site = request.getfixturevalue("site")
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_DATABASE_URL", site.database_url)


@pytest.fixture(scope="session")
def worker(site: Site) -> Worker:
    """The one worker of that site."""
    return site.worker("only")
