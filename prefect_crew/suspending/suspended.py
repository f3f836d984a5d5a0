"""Which suspended flow runs wait for which run: notes on the Prefect server, beside the record and pruned with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_crew.record_store import SUSPENDED, PrefectRecords, suspended_prefix
from prefect_crew.records import RunRecord
from prefect_crew.reviews import same_output
from prefect_crew.waiting import WaitPolicy

__all__ = ["SuspendedWait", "SuspendedWaits"]


class SuspendedWait(BaseModel):
    """One flow run that is suspended, or about to be, until a run needs it. `since` is UTC.

    `policy` tells when its time is over, and `human_extra` how many seconds people got beyond it. `asks`: whether it
    has somebody to ask when the crew waits for a person. `asked` is the digest of the question that is in its form, or
    stands in line for it, empty where the status shows nothing to judge, and `answers` how many answers came before.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    flow_run_id: str
    run_key: str
    attempt: int
    since: datetime
    policy: WaitPolicy
    asks: bool = False
    asked: str | None = None
    answers: int = 0
    human_extra: float = 0.0

    @property
    def name(self) -> str:
        """The name of its note."""
        return suspended_prefix(self.run_key, self.attempt) + self.flow_run_id.replace("-", "")

    def asks_for(self, asked: str | None, answers: int) -> bool:
        """Return whether this question, after so many answers, is the one that it asks."""
        return self.asked is not None and self.answers == answers and same_output(self.asked or None, asked)


class SuspendedWaits:
    """The notes, one for each flow run and run.

    Raises:
        httpx.HTTPError: The Prefect API is away or refuses.
    """

    def __init__(self, records: PrefectRecords | None = None) -> None:
        self._records = records or PrefectRecords()

    async def put(self, wait: SuspendedWait) -> None:
        """Write one down, before its flow run is suspended: whoever learns of the crew's end then finds it."""
        await self._records.put_note(wait.name, wait.model_dump(mode="json"))

    async def remove(self, name: str) -> None:
        """Take one away. One that is not there is no error."""
        await self._records.delete_note(name)

    async def forget(self, record: RunRecord, flow_run_id: str) -> None:
        """Take away what a flow run wrote down about a run."""
        await self.remove(suspended_prefix(record.run_key, record.attempt) + flow_run_id.replace("-", ""))

    async def of(self, run_key: str, attempt: int, flow_run_id: str | None = None) -> list[SuspendedWait]:
        """Return who waits for an attempt; of one flow run only where that is given."""
        prefix = suspended_prefix(run_key, attempt) + (flow_run_id or "").replace("-", "")
        return [wait async for wait in self._like(prefix) if wait.run_key == run_key]

    async def waits(self, record: RunRecord, flow_run_id: str | None) -> bool:
        """Return whether a flow run was suspended for an attempt, and has not been told of its end since.

        Such a flow run that asks for a failed run is told of that failure: being resumed is no order for another run.
        """
        return flow_run_id is not None and bool(await self.of(record.run_key, record.attempt, flow_run_id))

    async def all(self) -> AsyncIterator[SuspendedWait]:
        """Yield every one, in no promised order."""
        async for wait in self._like(SUSPENDED):
            yield wait

    async def _like(self, prefix: str) -> AsyncIterator[SuspendedWait]:
        async for note in self._records.notes(prefix):
            try:
                yield SuspendedWait.model_validate(note["value"])
            except ValidationError:  # somebody else's Variable
                continue
