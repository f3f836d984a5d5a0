"""The fixtures for users' tests, used as a user would."""

from pathlib import Path

import httpx
import pytest

from prefect_crew import WaitPolicy, run_crew
from prefect_crew.devserver import CrewServer
from prefect_crew.testing import CrewServerFactory

pytest_plugins = ["pytester"]

CREW = "name: mine\ninputs: [topic]\ntasks: [{name: t, seconds: 0.2, output: 'about {{ topic }}'}]"


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.usefixtures("instant_polling")
def test_a_test_may_have_several_servers(crew_server: CrewServerFactory, scripted_crew: CrewServer, tmp_path: Path):
    (tmp_path / "crew.yaml").write_text(CREW)
    server = crew_server(tmp_path / "crew.yaml", faults=["inputs:503=2@1"], response_format="live", token="t")
    answers = [httpx.get(f"{server.url}/inputs", headers={"Authorization": "Bearer t"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [503, 200]
    block = server.crew(
        request_timeout=5, wait=WaitPolicy(initial=3600)
    )  # polling is instant, whatever the policy says
    assert block.url == server.url
    assert block.token.get_secret_value() == "t"
    assert block.request_timeout == 5
    assert run_crew(block, {"topic": "bees"}).output == "about bees"
    assert run_crew(scripted_crew.crew(), {"text": "hi"}).output == "hi"
    assert server.kickoffs == 1
    assert scripted_crew.kickoffs == 1
    server.stop()
    assert crew_server("echo", port=server.port).port == server.port


@pytest.mark.programs
def test_servers_end_with_their_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import httpx
        import pytest

        servers, databases = [], []

        def test_start(crew_server, crew_database):
            databases.append(crew_database)
            servers.extend([crew_server("echo"), crew_server("echo")])
            assert all(httpx.get(server.url).text == "Healthy" for server in servers)

        def test_ended(crew_database):
            assert crew_database not in databases, "each test has a crew database of its own"
            for server in servers:
                with pytest.raises(httpx.ConnectError):
                    httpx.get(server.url)
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)
