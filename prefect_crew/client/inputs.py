"""The inputs of one run, with the secret ones; and the comparison with the inputs that a crew names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from prefect_crew.client.encoding import as_text, encode_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import MASK, Redactor, holds_secret
from prefect_crew.exceptions import ConfigurationError

STATE_ID = "id"
"""The name of the input that a Flow uses as the id of its state. An id that was used before leads to the existing
state, so two runs must not share it by accident."""


class Unshown(dict[Any, Any]):
    """A dict whose repr shows only its keys, because error reporters show the local variables of all frames."""

    def __repr__(self) -> str:
        return f"Unshown({list(self)})"


@dataclass(frozen=True, repr=False, eq=False)
class Inputs:
    """The inputs of one run. A public function makes them as its first step, and every later step takes them.

    The repr shows only names, so that no frame of a traceback shows a value, not even a frame of Prefect's engine. The
    class is a dataclass, since Prefect looks into the parameters of a task for futures and results of other tasks. A
    pickle contains the values, because a task runner sends the parameters of a task to its processes as a pickle.

    Args:
        values: The inputs as the caller passes them. A value of pydantic's secret types is always secret.
        secret: The names of further secret inputs.
        is_hidden: Whether any input and any text of the crew may hold a secret, so that none is shown.
        as_json: Whether the crew takes JSON values instead of text.
        restore_from: The id of the Flow state from which the run starts.
        session: The session of Flow runs to which the run belongs.
    """

    values: Mapping[str, Any]
    secret: frozenset[str] = frozenset()
    is_hidden: bool = False
    as_json: bool = False
    restore_from: str | None = None
    session: str | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any] | Inputs | None) -> Inputs:
        """Return the inputs of a user's mapping. `Inputs` are returned unchanged.

        Raises:
            ConfigurationError: `inputs` is no mapping.
        """
        if isinstance(inputs, Inputs):
            return inputs
        if inputs is not None and not isinstance(cast("Any", inputs), Mapping):
            raise ConfigurationError(
                f"Give the inputs by name, as a mapping, not as {type(inputs).__name__}. Nothing was started."
            )
        return cls(Unshown(inputs or {}))

    def __repr__(self) -> str:
        return f"Inputs({list(self.values)})"

    def keep_secret(self, names: Iterable[str]) -> Inputs:
        """Return a copy with further secret inputs."""
        return replace(self, secret=self.secret.union(names))

    @cached_property
    def plain(self) -> Mapping[str, Any]:
        """The inputs as JSON values, without inputs that are None.

        Raises:
            ConfigurationError: A value cannot be sent.
        """
        try:
            return Unshown(encode_inputs(self.values, as_json=True))
        except ConfigurationError as error:
            problem = str(error)
        raise ConfigurationError(f"{problem} Nothing was started.")  # outside: the frames of `error` contain values

    @cached_property
    def texts(self) -> Mapping[str, str]:
        """The inputs as text."""
        return Unshown({name: as_text(value) for name, value in self.plain.items()})

    @property
    def encoded(self) -> Mapping[str, Any]:
        """The inputs as the crew takes them."""
        return self.plain if self.as_json else self.texts

    @cached_property
    def secret_values(self) -> Mapping[str, Any]:
        """The inputs that are secret by their name or their type, whose values are masked everywhere."""
        names = (name for name in self.plain if name in self.secret or holds_secret(self.values[name]))
        return Unshown({name: self.plain[name] for name in names})

    @property
    def secret_names(self) -> tuple[str, ...]:
        """The names of the inputs that are not shown."""
        return tuple(self.plain if self.is_hidden else self.secret_values)

    @cached_property
    def digests(self) -> dict[str, str]:
        """A short digest of each input that is not secret, by its name: a conflict names the inputs that differ."""
        shown = {name: text for name, text in self.texts.items() if name not in self.secret_values}
        return {name: hashlib.sha256(text.encode()).hexdigest()[:8] for name, text in shown.items()}

    @cached_property
    def digest(self) -> str:
        """32 hex digits of the SHA-256 of `restore_from`, `session` and the inputs that are not secret, as text, in any
        order.

        It contains no secrets, so that a flow that fetches a new token for each attempt reattaches to its run.
        """
        shown = {name: self.texts[name] for name in self.digests}
        text = json.dumps(shown, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        if self.restore_from is not None:
            text += f"\nrestoreFromStateId:{self.restore_from}"  # JSON without indentation contains no line break
        if self.session is not None:
            text += f"\nsession:{self.session}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def shown(self, redact: Redactor) -> dict[str, Any]:
        """Return the inputs as JSON values with every secret masked, also where another input repeats it."""
        return {name: MASK if name in self.secret_names else redact.tree(value) for name, value in self.plain.items()}


def missing_inputs(expected: Iterable[CrewInput], inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of required inputs that `inputs` lacks or holds None for, in the crew's order."""
    return [item.name for item in expected if item.required and inputs.get(item.name) is None]


def unknown_inputs(expected: Iterable[CrewInput], inputs: Mapping[str, Any]) -> list[str]:
    """Return the names in `inputs` that the crew does not name, in their order; an empty list if it names no inputs."""
    # A crew takes these, but `GET /inputs` does not list them. The platform gives the second one to a triggered run.
    names = {item.name for item in expected} or {*inputs}
    return [name for name in inputs if name not in {*names, STATE_ID, "crewai_trigger_payload"}]
