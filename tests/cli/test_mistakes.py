"""Each mistake that a person can make on the line: its exit code, and one sentence that says what to do."""

import re
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client

from prefect_crew import DeployedCrew
from prefect_crew.devserver import CrewServer
from support.commands import TOKEN, Command

NO_COMMAND = "prefect-crew --help lists the commands; prefect-crew COMMAND --help lists their options."
BATCH_RUN = "batch run {crew} {rows} --name a-mistake --export {folder}/out.jsonl"
NOTHING_WRITTEN = "is not an empty folder. Nothing was written."
RENAMED = "Give --url for a new crew 'new'. If a crew of that name is stored already, give --overwrite."


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("bogus", ""),
        ("result", 'Command "result" parameter KEY requires an argument.'),
        ("serve --port 99999", ""),
        ("run", 'Command "run" parameter CREW requires an argument.'),
        ("run travel --ouput x", "Did you mean --output?"),
        ("runs resolve key --lost --never-started", ""),
        ("automations apply --waiting 4hours", "Invalid value"),
        ("costs --from May", 'Invalid value for --from: unable to convert "May"'),
        ("deploy", "Received 0 arguments. Exactly 1 of {CREW, --pipeline} must be specified."),
        ("batch run travel rows.csv --name x", 'Command "batch run" parameter --export requires an argument.'),
        ("batch run x y.csv --name x --export y --on-failure 1x", 'convert "1x"'),
    ],
)
def test_a_line_that_is_not_understood(here: Command, prefect_api: object, line: str, problem: str):
    done = here(*line.split())
    assert done.code == 2
    assert done.out == ""
    assert problem in done.err
    assert NO_COMMAND in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("line", "code", "problem"),
    [
        ("inputs ftp://x.test", 2, "ftp"),
        ("inputs http://crew.example.com", 2, "--allow-http"),
        ("inputs http://me:hunter2@127.0.0.1:1", 2, "carries credentials"),
        ("inputs {closed}", 1, "no answer"),
        ("inputs nowhere", 2, "prefect-crew crews save nowhere --url URL"),
        ("docs recver", 2, "did you mean recover?"),
        ("init {folder}", 2, f"{{folder}} {NOTHING_WRITTEN}"),
        ("serve no-such-crew", 2, "no-such-crew"),
        ("serve echo --fault kickoff:odd", 2, "odd"),
        ("serve echo --speed 0", 2, "The speed is 0. Give a number above 0; inf takes no time."),
        ("serve echo --host 192.0.2.1", 1, "Cannot listen on"),
        ("serve echo --port {port}", 1, "Cannot listen on 127.0.0.1:{port}: Address already in use. --port 0 takes"),
        ("run {closed} -i topic", 2, "does not have the form name=value"),
        ("run {closed} -i a=1 -i a=2", 2, "-i a is given twice"),
        ("run {url}", 2, "Missing inputs: who"),
        ("run {url} -i who=Ada -i colour=red", 2, "Unknown inputs: colour."),
        ("run {url} -i who=Ada --timeout 0", 2, "timeout"),
        ("run {url} -i who=Ada --key {{tomorrow}}", 2, "scheduled_start"),
        ("run {url} -i who=Ada --session=", 2, "session has to be a name of 1 to 200 characters"),
        ("run {url} -i id=1 --session a", 2, "is not saved as a Flow"),
        (f"run {{url}} --session a --restore-from {UUID(int=1)}", 2, "A session chooses the state to restore itself"),
        ("result never-used", 2, "never-used"),
        ("runs cancel never-used --crew {url}", 2, "No run has the key or kickoff id 'never-used'"),
        ("runs resolve batch/no-batch/z --never-started --yes", 2, "no-batch"),
        ("reviews approve never-used", 2, "No run has the key or kickoff id 'never-used'"),
        ("batch inspect nobody's", 2, "nobody's"),
        ("batch plan {crew} nowhere.csv", 2, "nowhere.csv"),
        (
            f"{BATCH_RUN} --map who=naem",
            6,
            "none of its 20 rows can be run: input 'who' needs column naem (did you mean name?), which the row does "
            "not have (for a constant text, write it as a template, with both pairs of braces: {{{{ 'text' }}}})",
        ),
        (
            "costs --from 2026-05-02 --to 2026-05-01",
            2,
            "The first day, 2026-05-02, is later than the last, 2026-05-01.",
        ),
        ("crews save new", 2, RENAMED),
        ("crews save new --url http://x.example.com", 2, "plain text"),
        ("crews save new --url {closed} --max-attempts 0", 2, "max_attempts"),
        ("crews save Not-A-Name --url {closed}", 2, "not stored"),
        ("crews save {crew} --url {other}", 2, "--overwrite"),
        ("deploy {closed}", 2, "prefect-crew crews save NAME"),
        ("deploy x --timezone UTC", 2, "Give --cron too"),
        ("deploy {crew} --pool no-such-pool", 2, "prefect work-pool create no-such-pool"),
        ("deploy {crew} -i colour=red", 2, "does not know the inputs colour; it takes who."),
        ("deploy {crew} --cron now -i who=Ada", 2, "cron"),
        (
            "deploy {crew} --cron @daily --timezone Mars/Base -i who=Ada",
            2,
            "timezone: Invalid timezone",
        ),
        ("deploy --pipeline {pipeline} -i colour=red", 2, "it takes who, times, tone."),
        ("deploy --pipeline {pipeline} -i times=two", 2, "The default of the input times must be JSON of the"),
        ("deploy --pipeline {no_step}", 2, "'whom' is no step, and no input that has a value"),
        ("deploy --pipeline {no_crew}", 2, "No crew is stored under the name 'no-"),
        ("deploy --pipeline {pipeline} --session a", 2, "takes no session"),
        ("deploy {crew} --session a", 2, "takes no session"),
        ("deploy --pipeline nowhere.yaml", 2, "The pipeline in nowhere.yaml cannot be read"),
        ("automations apply", 2, "Recovery needs a work pool"),
        ("automations apply --pool nowhere", 2, "prefect work-pool create nowhere"),
        ("automations apply --notify slack-webhook/nobody", 2, "no block slack-webhook/nobody"),
        ("automations apply --notify secret/mute", 2, "secret/mute cannot send notifications"),
    ],
)
def test_an_error_is_a_sentence(
    here: Command, greeter: str, pipeline: Path, crews: CrewServer, line: str, code: int, problem: str
):
    Secret(value="x").save("mute", overwrite=True, _sync=True)  # type: ignore[arg-type]
    rows = pipeline.with_name("rows.jsonl")
    rows.write_text('{"name": "Ada"}\n' * 20)
    places: dict[str, Any] = {
        "crew": greeter,
        "pipeline": pipeline,
        "rows": rows,
        "folder": rows.parent,
        "port": crews.port,
    }
    places |= {"closed": "http://127.0.0.1:1", "url": f"{crews.url}/greet", "other": f"{crews.url}/broken"}
    for mistake, before, after in (("no_step", "{ who }", "{ whom }"), ("no_crew", "crew: ", "crew: no-")):
        places[mistake] = rows.with_name(f"{mistake}.yaml")
        places[mistake].write_text(pipeline.read_text().replace(before, after))
    files = {path: path.read_text() for path in rows.parent.iterdir() if path.is_file()}
    block, kickoffs = DeployedCrew.load(greeter), crews.kickoffs

    done = here(*line.format(**places).split())

    assert done.code == code, done.err
    assert done.out == ""
    assert any(problem.format(**places) in sentence for sentence in done.err.splitlines()), done.err
    assert not re.search(r"Traceback|errors\.pydantic\.dev|\.\.$", done.err, re.MULTILINE)
    assert NO_COMMAND not in done.err
    assert len(done.err.strip().splitlines()) <= 3, "a sentence, and what to type"
    assert not re.search(f"{TOKEN}|hunter2", done.err)
    assert crews.kickoffs == kickoffs
    assert {path: path.read_text() for path in files} == files
    assert DeployedCrew.load(greeter) == block
    with get_client(sync_client=True) as client:
        blocks = client.request("POST", "/block_documents/filter", json={}).json()
        automations = client.request("POST", "/automations/filter", json={}).json()
    assert "new" not in {block["name"] for block in blocks}
    assert not [automation for automation in automations if automation["name"].startswith("prefect-crew: ")]
