"""The inputs of one run, made once at the door; which of them are secret, and which a crew lacks or does not know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from pydantic import SecretStr

from prefect_crew.client.encoding import encode_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import MASK, Redactor, holds_secret
from prefect_crew.exceptions import ConfigurationError

STATE_ID = "id"
"""The input that a Flow takes for the id of its state. It must be a UUID there, and one that was used before leads to
the existing execution: no two runs may share it by accident."""
NEVER_UNKNOWN = frozenset({STATE_ID, "crewai_trigger_payload"})
"""Inputs that a crew takes without naming them. The second is what the platform gives a run that a trigger starts."""


class Unshown(dict[Any, Any]):
    """A dict whose repr shows its keys alone: error reporters show the local variables of all frames."""

    def __repr__(self) -> str:
        return f"Unshown({list(self)})"


@dataclass(frozen=True, repr=False, eq=False)
class Inputs:
    """The inputs of one run. A public function makes it as its first step, and every later step takes it.

    It is opaque: its repr shows the names alone, so that no frame shows a value, not even one of Prefect's engine. It
    is a dataclass, since Prefect looks into the parameters of a task for futures and for results of other tasks. Its
    pickle holds the values, because a task runner sends the parameters of a task to its processes as a pickle.

    Args:
        values: The inputs as their giver has them. One of pydantic's secrets is secret whatever the crew says.
        secret: The names of further secret inputs.
        secret_texts: Texts that are secret wherever they stand in an input.
        as_json: Whether the crew takes JSON values instead of text.
        restore_from: The id of the state that the run starts from.
    """

    values: Mapping[str, Any]
    secret: frozenset[str] = frozenset()
    secret_texts: tuple[SecretStr, ...] = ()
    as_json: bool = False
    restore_from: str | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any] | Inputs | None) -> Inputs:
        """Return the inputs that a user gives as a mapping; inputs that were made before as they are.

        Raises:
            ConfigurationError: They are no mapping.
        """
        if isinstance(inputs, Inputs):
            return inputs
        if inputs is not None and not isinstance(cast("Any", inputs), Mapping):
            raise ConfigurationError(
                f"Inputs are given by name, as a mapping, and not as {type(inputs).__name__}. Nothing was started."
            )
        return cls(Unshown(inputs or {}))

    def __repr__(self) -> str:
        return f"Inputs({list(self.values)})"

    def keep_secret(self, names: Iterable[str], texts: Iterable[SecretStr] = ()) -> Inputs:
        """Return a copy in which these inputs, and these texts, are secret as well."""
        return replace(self, secret=self.secret.union(names), secret_texts=(*self.secret_texts, *texts))

    @cached_property
    def encoded(self) -> Mapping[str, Any]:
        """The inputs as the crew API takes them, without those that are None.

        Raises:
            ConfigurationError: A value cannot be sent.
        """
        return self._encode(as_json=self.as_json)

    def _encode(self, *, as_json: bool) -> Mapping[str, Any]:
        try:
            return Unshown(encode_inputs(self.values, as_json=as_json))
        except (TypeError, ValueError) as error:
            problem = str(error)
        raise ConfigurationError(f"{problem} Nothing was started.")  # out here: the frames of the error hold values

    @cached_property
    def secret_names(self) -> tuple[str, ...]:
        """The names of the inputs that are secret, or that hold a secret text."""
        hides = Redactor(self.secret_texts).hides if self.secret_texts else None
        return tuple(name for name, value in self.encoded.items() if self._is_secret(name) or (hides and hides(value)))

    def _is_secret(self, name: str) -> bool:
        return name in self.secret or holds_secret(self.values[name])

    @property
    def secret_values(self) -> list[Any]:
        """What is secret wherever it stands: the values of the secret inputs, and the secret texts."""
        return [*(self.encoded[name] for name in self.encoded if self._is_secret(name)), *self.secret_texts]

    @cached_property
    def digest(self) -> str:
        """The digest of the inputs that are not secret, and of `restore_from`: equal runs have equal ones.

        A secret tells no two runs apart: a flow that fetches a new one for each attempt finds its run again.
        """
        plain = {name: value for name, value in self.encoded.items() if name not in self.secret_names}
        return inputs_digest(plain, restore_from=self.restore_from, is_text=not self.as_json)

    def shown(self, redact: Redactor) -> dict[str, Any]:
        """Return the inputs as they are sent, with the secret ones masked, also where another one repeats them."""
        return {name: MASK if name in self.secret_names else redact.tree(value) for name, value in self.encoded.items()}

    def words(self, redact: Redactor) -> dict[str, str | int]:
        """Return the inputs that may name a run on Prefect's pages: words and numbers that are not secret."""
        plain = {name: self.values[name] for name in self.encoded if name not in self.secret_names}
        return {name: redact.tree(value) for name, value in plain.items() if isinstance(value, str | int)}

    def storable(self) -> dict[str, Any]:
        """Return the inputs as Prefect may store them: JSON values, none of them secret."""
        plain = self._encode(as_json=True)
        return {name: MASK if name in self.secret_names else value for name, value in plain.items()}


def missing_inputs(expected: Iterable[CrewInput], inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of required inputs that `inputs` lacks or holds None for, in the crew's order."""
    return [item.name for item in expected if item.required and inputs.get(item.name) is None]


def unknown_inputs(expected: Iterable[CrewInput], inputs: Mapping[str, Any]) -> list[str]:
    """Return the names in `inputs` that the crew does not name, in the given order; none where it names no inputs."""
    names = {item.name for item in expected}
    return [name for name in inputs if name not in names and name not in NEVER_UNKNOWN] if names else []


def inputs_digest(inputs: Mapping[str, Any], *, restore_from: str | None = None, is_text: bool = False) -> str:
    """Return 32 hex digits that equal inputs share, whatever their order: of the SHA-256 of their text form.

    A state that the run is to start from makes it another run. `is_text`: the inputs are encoded already.
    """
    text = inputs if is_text else encode_inputs(inputs)
    canonical = json.dumps(text, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    if restore_from is not None:
        canonical += f"\nrestoreFromStateId:{restore_from}"  # no JSON without indentation holds a new line
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
