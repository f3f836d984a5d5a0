"""The tokens that webhooks report, by run. A process that waits asks for them once, when it has seen the run's end."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect_crew.client._parsing import tokens_of
from prefect_crew.client.models import TokenUsage
from prefect_crew.receiver.events import WebhookEvent, event_name
from prefect_crew.webhooks import CALLED, COMPLETED, CREW_ENDED, run_name

MOST_RUNS = 10_000
"""Runs whose tokens are kept. No time limits that: a Flow's crews may end hours apart, and a part is not the whole."""
MOST_MODELS = 100  # models of one run, whose names anybody with its URL may invent
REMEMBERED = 10_000  # webhooks that are remembered, so that one that comes again is not counted again


@dataclass
class _Tokens:
    """The tokens of one run: of all of it, of its crews (a Flow may run several), and of the calls of each model."""

    whole: TokenUsage | None = None
    crews: TokenUsage | None = None
    models: dict[str, TokenUsage] = field(default_factory=dict[str, TokenUsage])

    def add(self, name: str, used: TokenUsage, model: Any) -> None:
        if name == COMPLETED:
            self.whole = used
        elif name == CREW_ENDED:
            self.crews = TokenUsage.sum(filter(None, [self.crews, used]))
        elif model in self.models or (model and len(self.models) < MOST_MODELS):
            self.models[model] = TokenUsage.sum(filter(None, [self.models.get(model), used])) or used

    def usage(self) -> TokenUsage | None:
        """Return the count with the most detail: calls distinguish prompts and completions, but some may be missing."""
        whole, called = self.whole or self.crews, TokenUsage.sum(self.models.values())
        if whole is None or called is None or whole.prompt_tokens is not None:
            return whole or called
        return called if (called.total_tokens or 0) >= (whole.total_tokens or 0) else whole


class ReportedUsage:
    """The tokens of the latest runs, by `webhooks.run_name`."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Tokens] = OrderedDict()
        self._counted: dict[UUID, None] = {}

    def add(self, event: WebhookEvent) -> None:
        """Add the tokens of a webhook to those of its run, once."""
        name, used, hook = event_name(event), tokens_of(event.facts), event.hook
        if used is None or name not in (COMPLETED, CREW_ENDED, CALLED) or event.id in self._counted:
            return
        if len(self._counted) >= REMEMBERED:
            self._counted.clear()
        self._counted[event.id] = None
        run = run_name(hook.idempotency_key, hook.attempt, hook.claim)
        self._runs.setdefault(run, _Tokens()).add(name, used, event.facts.get("model"))
        self._runs.move_to_end(run)
        if len(self._runs) > MOST_RUNS:
            self._runs.popitem(last=False)

    def of(self, run: str) -> dict[str, Any]:
        """Return the tokens of a run: in all, None if no webhook reported any, and by model."""
        tokens = self._runs.get(run, _Tokens())
        counts = {model: used.model_dump(exclude_none=True) for model, used in tokens.models.items()}
        usage = tokens.usage()
        return {"usage": usage and usage.model_dump(exclude_none=True), "models": counts}
