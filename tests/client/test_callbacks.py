"""Review by callback: what a request must hold, and which URLs are called. tests/runs/reviews has the answers."""

import json

import pytest
from pydantic import SecretStr

from prefect_crew.client._callbacks import FlowQuestion, answer_text, parse_question, post_answer
from prefect_crew.client.models import Review
from prefect_crew.exceptions import ConfigurationError, CrewConnectionError, ResponseFormatError
from support.frames import locals_of

REQUEST = {"event_type": "new_request", "id": "r-1", "flow_id": "k-1", "callback_url": "https://x.example/r?token=t0k"}


def test_an_outcome_is_one_of_the_requests_options():
    found = parse_question(json.dumps({**REQUEST, "emit": ["yes", "", 3, "no", "yes"]}).encode())
    assert found is not None
    assert found.kickoff_id == "k-1"
    assert found.task_id == "review"
    assert found.options == ("yes", "no")
    assert "t0k" not in repr(found)
    assert answer_text(found.options, Review(approve=True, feedback="Fine.")) == "yes: Fine."
    assert answer_text(found.options, Review(approve=False)) == "no"
    assert answer_text(found.options, Review(approve=False, feedback=" \n")) == "no", "blanks are no feedback"
    assert answer_text((), Review(approve=False, feedback=" \n")) == "rejected"
    with pytest.raises(ConfigurationError):
        answer_text(found.options, Review(approve=True, option="maybe"))
    assert parse_question(json.dumps({**REQUEST, "event_type": "other"}).encode()) is None


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "https://", "http://[s3cret", "https://x.example:s3cret/", 7, None], ids=str
)
def test_a_request_without_a_callable_url_is_refused(url: object):
    with pytest.raises(ResponseFormatError) as caught:
        parse_question(json.dumps({**REQUEST, "callback_url": url}).encode())
    assert "s3cret" not in str(caught.value)


async def test_no_answer_goes_to_an_unsafe_url():
    request = FlowQuestion(kickoff_id="k", callback_url=SecretStr("http://x.example/r?token=s3cret"))
    with pytest.raises(ConfigurationError, match="plain http") as caught:
        await post_answer(request, Review(approve=True, by="a person"))
    assert "s3cret" not in str(caught.value)


async def test_no_frame_of_a_failed_answer_shows_it():
    """Error reporters show the local variables of all frames."""
    words = ["w0rds"]
    url = SecretStr("http://127.0.0.1:9/r?token=t0k")
    request = FlowQuestion(id="r", kickoff_id="k", task_id="t", callback_url=url)
    with pytest.raises(CrewConnectionError) as caught:
        await post_answer(request, Review(approve=True, feedback=words.pop(), by="a person"))
    shown = locals_of(caught.value, but=__file__)
    assert "post_answer" in shown
    assert "w0rds" not in shown
    assert "t0k" not in shown
    assert str(caught.value.__cause__.request.url) == "http://127.0.0.1:9"  # type: ignore[union-attr]
