"""Masking: it keeps secrets out of logs, artifacts, events, errors, the crew database and files.

A crew may repeat any part of a request. So every text of a crew goes through a `Redactor` before it is shown or stored.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property, lru_cache
from typing import Any, TypeVar, cast
from urllib.parse import quote

from pydantic import BaseModel, Secret, SecretBytes, SecretStr

from prefect_crew.client.encoding import encode_inputs

MASK = "********"
SHORTEST = 4
"""Characters. A shorter secret is masked as an input, but not searched in texts, where it would match at random."""
SHORTEST_TOKEN = 8
"""Characters. No real token is shorter. A shorter one is a word such as "wrong" or "test": to mask it in a sentence of
the server would make the sentence unreadable, and would reveal the word. It is masked only after "Bearer"."""
SHORTEST_LINE = 8
"""Characters. A crew may repeat one line of a secret, such as a key in PEM."""

ModelT = TypeVar("ModelT", bound=BaseModel)


class Redactor:
    """Masks secrets in a text, single lines of secrets, and the forms of secrets in JSON, HTML and URLs.

    Args:
        values: Secret values, of any type that an input may have. The texts and numbers within them are secret as well.
        tokens: Bearer tokens.
    """

    def __init__(self, values: Iterable[Any] = (), *, tokens: Iterable[str] = ()) -> None:
        self._values = tuple(values)
        self._tokens = tuple(tokens)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts and numbers within its values."""
        return tuple({text for value in self._values for text in _texts(value) if len(text) >= SHORTEST})

    # On demand: each kickoff makes a redactor, and most of them have nothing to mask.
    @cached_property
    def secrets(self) -> tuple[str, ...]:
        """The texts to search for, the longest first."""
        if not self._values:
            return _token_secrets(self._tokens)
        texts = {text for value in self._values for text in _texts(value)}
        forms = {form for text in texts for form in _forms(text)}.union(*map(_token_forms, self._tokens))
        return _longest_first(forms)

    def __repr__(self) -> str:
        return "Redactor(…)"

    def __call__(self, text: str) -> str:
        """Return the text with every secret masked."""
        for secret in self.secrets:
            text = text.replace(secret, MASK)
        return text

    def tree(self, value: Any) -> Any:
        """Return a JSON-like value with every secret masked: in its texts, in its keys, and as a number."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return MASK if str(value) in self.secrets else value
        if isinstance(value, Mapping):
            pairs = cast("Mapping[Any, Any]", value).items()
            return {self.tree(key): self.tree(item) for key, item in pairs}
        if isinstance(value, list | tuple):
            return [self.tree(item) for item in cast("list[Any]", value)]
        return value

    def model(self, value: ModelT) -> ModelT:
        """Mask the secrets in a pydantic model of plain values and models; without one, return the same object.

        The names of its fields stay, and so do counts and durations, whose fields cannot hold the mask.
        """
        if not self.hides(value.model_dump_json()):
            return value  # the usual case, and ten times faster
        return value.model_copy(update={name: self._field(item, name) for name, item in value})

    def _field(self, item: Any, name: str) -> Any:
        if isinstance(item, BaseModel):
            return self.model(item)
        if name in ("data", "raw"):  # fields of any type
            return self.tree(item)
        if isinstance(item, list):
            return [self._field(part, name) for part in cast("list[Any]", item)]
        return item if isinstance(item, int | float) else self.tree(item)

    def hides(self, value: Any) -> bool:
        """Return whether a text or a JSON-like value contains a secret."""
        return self.tree(value) != value


def holds_secret(value: Any) -> bool:
    """Return whether a value is of one of pydantic's secret types, or contains such a value."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return False
    return isinstance(value, SecretStr | SecretBytes | Secret) or any(map(holds_secret, _parts(value)))


def _parts(value: Any) -> Iterable[Any]:
    """Return the parts of a value, as `encode_inputs` takes it apart."""
    if isinstance(value, BaseModel):
        return [*value.__dict__.values(), *(value.__pydantic_extra__ or {}).values()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value)
        return [*pairs, *pairs.values()]
    return cast("Iterable[Any]", value) if isinstance(value, Set | Sequence) else ()


def _texts(value: Any) -> Iterable[str]:
    """Yield the texts and numbers within a secret value: a crew may repeat one item of a list or an object."""
    try:
        plain = encode_inputs({"": value}, as_json=True).get("")
    except ValueError:
        return  # the value cannot be sent, so no crew repeats it
    yield from _within(plain)
    if not isinstance(plain, str):
        yield json.dumps(plain, ensure_ascii=False, separators=(",", ":"))  # the form in which it is sent


def _within(plain: Any) -> Iterable[str]:
    if isinstance(plain, str):
        yield plain
        yield from (line for line in map(str.strip, plain.splitlines()) if len(line) >= SHORTEST_LINE)
        if plain.lstrip()[:1] in ("[", "{"):  # lists and objects are sent as JSON text
            with suppress(ValueError, RecursionError):
                yield from _within(json.loads(plain))
    elif isinstance(plain, int | float) and not isinstance(plain, bool):
        yield str(plain)
    elif isinstance(plain, dict):
        for key, item in cast("dict[str, Any]", plain).items():
            # A key of letters only is the name of a field, such as "password", and no secret.
            yield from _within([item] if key.replace("_", "").isalpha() else [key, item])
    elif isinstance(plain, list):
        for item in cast("list[Any]", plain):
            yield from _within(item)


def _forms(text: str) -> set[str]:
    """Return the forms that a secret may have in a text: stripped of blanks, or escaped for JSON, HTML or a URL."""
    plain = {text, text.strip()}
    # Twice: an error may quote the JSON of a request within the JSON of its own.
    quoted = _json_forms(plain)
    quoted |= _json_forms(quoted)
    pages = {html.escape(form, quote=marks) for form in plain | quoted for marks in (True, False)}
    pages |= {page.replace("&#x27;", "&#39;") for page in pages}
    pages |= {page.replace("&quot;", "&#34;") for page in pages}
    addresses = {quote(form, safe=safe, errors="replace") for form in plain for safe in ("", "/")}
    return {*plain, *quoted, *pages, *addresses, *(repr(form)[1:-1] for form in plain)}


@lru_cache(maxsize=16)  # all rows of a batch have the same tokens
def _token_secrets(tokens: tuple[str, ...]) -> tuple[str, ...]:
    return _longest_first(set[str]().union(*map(_token_forms, tokens)))


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the texts that are long enough to search for, the longest first: a secret may contain another."""
    return tuple(sorted((text for text in texts if len(text) >= SHORTEST and text.strip("*")), key=len, reverse=True))


@lru_cache(maxsize=16)
def _token_forms(token: str) -> frozenset[str]:
    return frozenset(_forms(token if len(token) >= SHORTEST_TOKEN else f"Bearer {token}") if token else ())


def _json_forms(texts: Iterable[str]) -> set[str]:
    return {json.dumps(text, ensure_ascii=escaped)[1:-1] for text in texts for escaped in (True, False)}


_redact: ContextVar[Callable[[str], str] | None] = ContextVar("prefect_crew_withheld", default=None)
"""A context variable, since one session serves many runs, each with its own secrets. Only the caller that works on a
run knows them, and the functions between it and the client take a call, not a run."""


@contextmanager
def withholding(redact: Callable[[str], str]) -> Generator[None]:
    """Inside this block, errors of the client pass the server's text through `redact` before they quote it."""
    reset = _redact.set(redact)
    try:
        yield
    finally:
        _redact.reset(reset)


def withheld(text: str) -> str:
    """Mask a text of the server with the `redact` of the enclosing `withholding`, if any."""
    redact = _redact.get()
    return text if redact is None else redact(text)
