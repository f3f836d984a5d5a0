"""The flows of `prefect_crew.operations`, deployed by their import paths and run on both kinds of work pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.crew_pool import CrewPool
from support.deployed import command, wait_until
from support.prefect_server import PrefectServer

INPUTS: dict[str, dict[str, Any]] = {
    "batch_file": {"crew": "echo", "dataset": "rows.csv", "name": "rows of KIND", "export": "rows.jsonl"},
    "prune_records": {"dry_run": True, "older_than_days": 30},
    "recover": {"max_attempts": 5},
}


@pytest.mark.parametrize("kind", ["crew", "process"])
def test_each_is_deployed_and_run_without_the_repository(kind: str, prefect_server: PrefectServer, tmp_path: Path):
    (tmp_path / "rows.csv").write_text("text\ntea\n")
    with CrewPool(prefect_server, tmp_path, kind=kind) as pool:
        crew = pool.add_crew("echo", "echo")
        pool.worker(f"operations-{kind}")
        started: dict[str, str] = {}
        for name, inputs in INPUTS.items():
            paths = {"dataset", "export"} & set(inputs)
            given = {**inputs, **{path: str(tmp_path / inputs[path]) for path in paths}}
            parameters = json.dumps(given).replace("KIND", kind)
            line = ("prefect", "--no-prompt", "deploy", f"prefect_crew.operations.{name}", "--pool", pool.name)
            command(*line, "--name", kind, "--params", parameters, env=pool.env, cwd=tmp_path)
            deployment = pool.call("GET", f"/deployments/name/{name.replace('_', '-')}/{kind}")
            # A flow run that has ended well: there is nothing to recover.
            more = {"flow_run_id": started["prune_records"]} if name == "recover" else {}
            started[name] = pool.start(deployment["id"], **more)
        ended = {name: pool.wait_for(run, seconds=120)["state_type"] for name, run in started.items()}
        assert ended == dict.fromkeys(INPUTS, "COMPLETED")
        # A process sends its last logs after its last state.
        wait_until(lambda: "left alone" in pool.logs(started["recover"]), seconds=30, what="the recovery's log")
        assert crew.kickoffs == 1
    assert (tmp_path / "rows.jsonl").exists()
