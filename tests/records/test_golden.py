"""Records as an earlier version of this package left them on a Prefect server, one file for each phase.

They are never written anew: a later version reads them as this one does. What a later version adds or renames gets a
file of its own.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.records.model import Entry, RecordPhase, RunRecord, utcnow
from prefect_crew.records.store import records_in
from prefect_crew.records.variables import Variable

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))


def test_every_phase_has_a_file():
    assert {json.loads(path.read_text())["means"]["phase"] for path in GOLDEN} == set(map(str, RecordPhase))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_record_keeps_its_meaning(path: Path):
    golden: dict[str, Any] = json.loads(path.read_text())
    variables = [Variable(one["id"], one["name"], one["value"], 3.0, 3.0, utcnow()) for one in golden["variables"]]
    (record,) = records_in(variables)
    found = json.loads(record.model_dump_json()) | {"entries": record.entries}
    found["result"] = None if record.result is None else record.result.output
    assert {name: found[name] for name in golden["means"]} == golden["means"]
    may_still_be_sent = record.phase in (RecordPhase.CLAIMED, RecordPhase.UNCERTAIN)
    assert (record.open_for > 0) is may_still_be_sent


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_this_version_writes_what_it_read(path: Path):
    for one in json.loads(path.read_text())["variables"]:
        model = Entry if one["tags"][:1] == ["prefect-crew-entry"] else RunRecord
        assert model.model_validate(one["value"]).model_dump(mode="json", exclude_none=True) == one["value"]
