"""Short fingerprints of a run's inputs: they name the inputs that differ where a run key is used with other ones.

A record is readable by everybody who may read Variables, and many inputs are short: "34" is guessed at once. So the
fingerprints are keyed by the crew's token, which no record holds, and those of secret inputs are not made at all.
Whoever has the token can check a guess; so can, of all inputs together, whoever has the digest of the inputs.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict

from prefect_crew.api._error import listed_names
from prefect_crew.api.inputs import encode_inputs

__all__ = ["InputMarks", "differing_inputs", "marks_of"]

_ROUNDS = 50_000
"""About 20 ms, once a process and token: a token that somebody has made up is not to be found by trying words."""


class InputMarks(BaseModel):
    """The fingerprints of a run's inputs by name, of those that are not secret.

    `key` is one of the token itself: after it was rotated, the others are comparable with nothing.
    """

    model_config = ConfigDict(extra="ignore")

    key: str
    inputs: dict[str, str]
    restore_from: str


def marks_of(
    token: str, inputs: Mapping[str, Any], *, secret: Collection[str] = (), restore_from: str | None = None
) -> InputMarks | None:
    """Return the fingerprints of encoded inputs, None without a token.

    As the digest of the inputs, they are of the text form: the switch to JSON values makes no other inputs.
    """
    if not token:
        return None
    key = _key(token)
    return InputMarks(
        key=_mark(key, "key"),
        inputs={
            name: _mark(key, "input", name, value)
            for name, value in encode_inputs(inputs).items()
            if name not in secret
        },
        restore_from=_mark(key, "restore from", restore_from),
    )


def differing_inputs(then: InputMarks, now: InputMarks, *, secret: Collection[str]) -> str | None:
    """Return for people in what the inputs differ, None where that cannot be told. To be asked where they do differ.

    Args:
        then, now: The fingerprints.
        secret: Names of inputs that are secret to either.
    """
    if then.key != now.key:
        return None
    before = {name: mark for name, mark in then.inputs.items() if name not in secret}
    after = {name: mark for name, mark in now.inputs.items() if name not in secret}
    differ = [name for name, mark in after.items() if before.get(name, mark) != mark]
    missing = [name for name in before if name not in after]
    added = [name for name in after if name not in before]
    kinds = {"another value": differ, "given then only": missing, "given now only": added}
    parts = [f"{kind}: {listed_names(names)}" for kind, names in kinds.items() if names]
    found = [f"its inputs differ ({'; '.join(parts)})"] if parts else []
    if then.restore_from != now.restore_from:
        found.append("it starts from another state (restore_from)")
    return "; ".join(found) or "its inputs differ, and none of those that are not secret does"


@lru_cache(maxsize=64)
def _key(token: str) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", token.encode(), b"prefect-crew input marks", _ROUNDS)


def _mark(key: bytes, *parts: Any) -> str:
    return hmac.new(key, json.dumps(parts, ensure_ascii=False).encode(), "sha256").hexdigest()[:8]
