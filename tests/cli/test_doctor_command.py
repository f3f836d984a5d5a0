"""`doctor` on the command line: marks, exit codes, JSON, and what it does without Prefect."""

from __future__ import annotations

from prefect_crew.devserver import CrewServer
from support.prefect_server import PrefectServer


def test_all_is_well(here, prefect_api: PrefectServer, crews: CrewServer):
    done = here("doctor", f"{crews.url}/greet")
    assert done.code == 0
    assert f"✓ Prefect API: {prefect_api.api_url} answers" in done.out
    assert "✓ inputs: the crew takes who" in done.out
    assert done.out.endswith("Nothing has to be mended.\n")


def test_a_problem_has_a_way_out_and_a_code(here, prefect_api: PrefectServer, crews: CrewServer):
    done = here("doctor", f"{crews.url}/greet", "--token", "wrong-token", "--json")
    assert done.code == 29
    assert done.json["problems"] == 1
    (problem,) = [one for one in done.json["findings"] if one["level"] == "problem"]
    assert problem["subject"] == "token"
    assert "prefect-crew save" in problem["mend"]


def test_a_crew_is_looked_at_even_if_prefect_is_away(alone, crews: CrewServer):
    done = alone("doctor", f"{crews.url}/greet", env={"PREFECT_API_URL": "http://127.0.0.1:1/api"})
    assert done.code == 29
    assert "✗ Prefect API: The Prefect API at http://127.0.0.1:1/api does not answer" in done.out
    assert "✓ token: it is accepted" in done.out
    assert done.out.endswith("To mend: 1.\n")
    assert "Traceback" not in done.err


def test_a_block_that_is_not_stored(here, prefect_api: PrefectServer):
    done = here("doctor", "never-stored")
    assert done.code == 29
    assert "✗ crew: No crew is stored under the name 'never-stored'" in done.out
