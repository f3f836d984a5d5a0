"""A data set over several processes: plain batches over ranges of its rows, each by itself."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches, postgres_ledger
from support.postgres import Postgres
from support.prefect_server import PrefectServer
from support.processes import Process
from support.scripts import script

PART = """
import sys
from prefect_crew import DeployedCrew, WaitPolicy, run_batch

url, token, dataset, ledger, output, name, rows = sys.argv[1:]
report = run_batch(
    DeployedCrew(url=url, token=token), dataset, name=name, output=output, ledger=ledger, rows=rows, max_in_flight=20,
    wait=WaitPolicy(initial=0.1, factor=1, max_interval=0.5),
)
print("REPORT", report.completed, report.failed, report.uncertain, report.kickoffs)
"""


@pytest.mark.postgres
def test_two_processes_run_two_ranges_and_one_that_is_killed_is_called_again(
    prefect_api: PrefectServer, tmp_path: Path, crew_server: CrewServerFactory, postgres: Postgres
):
    server = crew_server(script({"seconds": 0.5, "output": "on {{ topic }}"}, inputs=["topic"]))
    (tmp_path / "rows.csv").write_text("topic\n" + "".join(f"topic {number}\n" for number in range(300)))
    ledger = postgres_ledger(postgres)

    def part(number: int, rows: str) -> Process:
        output = str(tmp_path / f"out-{number}.jsonl")
        given = [server.url, server.token, str(tmp_path / "rows.csv"), ledger, output, f"leads/{number}", rows]
        log = tmp_path / f"{number}-{time.monotonic()}.log"
        return Process([sys.executable, "-c", PART, *given], log=log, env=prefect_api.env())

    with part(1, "0:150") as one, part(2, "150:") as two:
        while one.running and kickoffs_of(server, 1) < 40:
            time.sleep(0.05)
        one.kill()
        two.wait(120)
        assert "REPORT 150 0 0 150" in two.tail()
    assert kickoffs_of(server, 1) < 150
    with part(1, "0:150") as again:
        again.wait(120)
        completed, failed, uncertain, _ = map(int, again.tail().rpartition("REPORT ")[2].split()[:4])
    assert (completed + uncertain, failed) == (150, 0)
    assert uncertain <= 32, "more than could have been on their way"
    assert max(server.kickoffs_by_key.values()) == 1
    lines = [
        *Batches(tmp_path).lines(tmp_path / "out-1.jsonl").values(),
        *Batches(tmp_path).lines(tmp_path / "out-2.jsonl").values(),
    ]
    assert len({line["inputs"]["topic"] for line in lines}) == len(lines) == 150 + completed


def kickoffs_of(server: CrewServer, part: int) -> int:
    return sum(key.startswith(f"batch/leads%2F{part}/") for key in list(server.kickoffs_by_key))
