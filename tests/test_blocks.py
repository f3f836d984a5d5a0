"""The block: what Prefect asks of every block, and what this one is."""

import math
import pickle
import uuid
from typing import Any

import pytest
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import SecretStr, ValidationError

from prefect_crew import CrewRun, DeployedCrew, NoResultError, WaitPolicy
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.held import Held
from support.waiting import until

TOKEN = SecretStr("the-token")


class TestDeployedCrewIsABlock(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[DeployedCrew]:
        return DeployedCrew

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """Prefect's own asks the network for it."""
        url = block._logo_url
        assert url is not None
        assert url.scheme == "https"
        assert url.host == "raw.githubusercontent.com"
        assert str(url).endswith(".png")


def crew(**fields: Any) -> DeployedCrew:
    return DeployedCrew(**{"url": "https://travel.test", "token": TOKEN, **fields})


def test_the_form_asks_first_for_what_everybody_fills_in_and_last_for_how_to_wait():
    fields = DeployedCrew.model_json_schema()["properties"]
    first, second, *_, last = fields
    assert first == "url"
    assert second == "token"
    assert last == "wait"
    assert all(fields[name]["examples"] for name in ("url", "page_url", "concurrency_limit"))
    waiting = WaitPolicy.model_json_schema()["properties"]
    for name, field in {**fields, **waiting}.items():
        assert "`" not in field["description"], f"{name}: Prefect's form shows backticks as they are"


def test_the_url_is_cleaned():
    assert crew(url=" https://travel.test/crews/1/ ").url == "https://travel.test/crews/1"


@pytest.mark.parametrize(
    "fields",
    [
        *({"url": url} for url in (None, "", "travel.test", "http://travel.test", "https://me:hunter2@travel.test")),
        *({"max_attempts": 0}, {"request_timeout": 0}, {"price": -1}, {"show": "everything"}, {"token": None}),
        *({"wait": {"initial": 0}}, {"max_attempt": 1}, {"wait": {"timeot": 60}}),
        # No date is so far away: they would fail once the kickoff is sent, or when a form is put up.
        *({"wait": {"timeout": 1e12}}, {"wait": {"human_timeout": 1e12}}, {"wait": {"timeout": math.inf}}),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused_without_the_token(fields: dict[str, Any]):
    with pytest.raises(ValidationError) as caught:
        crew(**{"token": "plain-text-token", **fields})
    for shown in (str(caught.value), repr(caught.value)):
        assert "text-token" not in shown
        assert "hunter2" not in shown
        assert ("Do you mean 'max_attempts'" in shown) is ("max_attempt" in fields)
        assert ("a crew's wait has no field 'timeot'. Do you mean 'timeout'" in shown) is ("timeot" in str(fields))


@pytest.mark.usefixtures("prefect_api")
async def test_it_is_stored_with_all_that_holds_for_its_runs_and_loaded_by_name():
    name = f"travel-{uuid.uuid4().hex[:8]}"
    policy = WaitPolicy(timeout=60, on_timeout="stop")
    block = crew(wait=policy, show="summary", secret_inputs=("pin",), price=0.5, max_attempts=2)
    await block.asave(name)
    loaded = await DeployedCrew.aload(name)
    assert loaded.label == name
    assert loaded.token.get_secret_value() == "the-token"
    fields = set(DeployedCrew.model_fields)
    assert loaded.model_dump(include=fields) == block.model_dump(include=fields)
    assert type(await Block.aload(f"deployed-crew/{name}")) is DeployedCrew


@pytest.mark.usefixtures("prefect_api")
async def test_a_stored_block_whose_wait_has_fields_of_another_version_is_loaded():
    name = f"travel-{uuid.uuid4().hex[:8]}"
    document = await crew(wait=WaitPolicy(timeout=60)).asave(name)
    async with get_client() as client:
        stored = await client.read_block_document(document, include_secrets=True)
        data = {**stored.data, "wait": {**stored.data["wait"], "mode": "suspend", "suspend_fallback": "refuse"}}
        update = BlockDocumentUpdate(block_schema_id=stored.block_schema_id, data=data)
        await client.update_block_document(document, update)
    assert (await DeployedCrew.aload(name)).wait == WaitPolicy(timeout=60)


# Prefect's JobBlock idiom


@pytest.mark.usefixtures("prefect_api", "instant_polling")
class TestIdiom:
    def test_a_pickled_run_has_its_result_and_no_inputs(self, crew_server: CrewServerFactory):
        run = crew_server("echo").crew(secret_inputs=["text"]).trigger({"text": "pass-4711"})
        assert isinstance(run, CrewRun)
        pickled = pickle.dumps(run)
        assert b"pass-4711" not in pickled
        run.wait_for_completion()
        assert run.fetch_result().output == pickle.loads(pickled).fetch_result().output

    async def test_a_result_can_be_fetched_without_having_waited(self, crew_server: CrewServerFactory):
        held = Held()
        run = await (server := crew_server(held)).crew().atrigger()
        await until(lambda: server.run(run.kickoff_id).state is CrewState.RUNNING, "it runs")
        with pytest.raises(NoResultError, match=f"Run {run.kickoff_id} .* has no result yet: it is running"):
            await run.afetch_result()
        held.release()
        await until(lambda: server.run(run.kickoff_id).state.ended, "it ends")
        assert (await run.afetch_result()).output == "done"
