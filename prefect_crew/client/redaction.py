"""Masking: it keeps secrets out of logs, artifacts, events, errors, the crew database and files.

A crew may repeat any part of a request. So every text of a crew goes through a `Redactor` before it is shown or stored.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property, lru_cache
from typing import Any, cast
from urllib.parse import quote

from pydantic import Secret, SecretBytes, SecretStr

from prefect_crew.client.encoding import as_plain, as_text, replacement

MASK = "********"
SHORTEST = 4
"""Characters. A shorter secret is masked as an input, but not searched in texts, where it would match at random."""
SHORTEST_TOKEN = 8
"""Characters. No real token is shorter. A shorter one is a word such as "wrong" or "test": to mask it in a sentence of
the server would make the sentence unreadable, and would reveal the word. It is masked only after "Bearer"."""
SHORTEST_LINE = 8
"""Characters. A crew may repeat one line of a secret, such as a key in PEM."""


class Redactor:
    """Masks secrets in a text, single lines of secrets, and the forms of secrets in JSON, HTML and URLs.

    Args:
        values: Secret values, of any type that an input may have. The texts and numbers within them are secret as well.
        tokens: Bearer tokens.
    """

    def __init__(self, values: Iterable[Any] = (), *, tokens: Iterable[str] = ()) -> None:
        self._values = tuple(values)
        self._tokens = tuple(tokens)

    # On demand: each kickoff makes a redactor, and most of them have nothing to mask.
    @cached_property
    def secrets(self) -> tuple[str, ...]:
        """The texts to search for, the longest first: a secret may contain another."""
        texts = {token if len(token) >= SHORTEST_TOKEN else f"Bearer {token}" for token in self._tokens if token}
        for value in self._values:
            with suppress(TypeError, ValueError, RecursionError):  # no crew repeats what cannot be sent
                plain = as_plain(value)
                texts |= {as_text(plain), *_texts(plain)}
        forms = {form for text in texts for form in _forms(text) if len(form) >= SHORTEST and form.strip("*")}
        return tuple(sorted(forms, key=len, reverse=True))

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

    def hides(self, value: Any) -> bool:
        """Return whether a text or a JSON-like value contains a secret."""
        return self.tree(value) != value


def holds_secret(value: Any) -> bool:
    """Return whether a value is of one of pydantic's secret types, or contains such a value."""
    secrets: list[Any] = []

    def look(item: Any) -> Any:
        if isinstance(item, SecretStr | SecretBytes | Secret):
            return secrets.append(item)
        with suppress(TypeError):
            return replacement(item)
        return None

    with suppress(TypeError, ValueError, RecursionError):  # it cannot be sent
        json.dumps(value, default=look)
    return bool(secrets)


def _texts(plain: Any) -> Iterable[str]:
    """Yield the texts and numbers within a secret JSON value: a crew may repeat one item of a list or an object."""
    if isinstance(plain, str):
        yield plain
        yield from (line for line in map(str.strip, plain.splitlines()) if len(line) >= SHORTEST_LINE)
        if plain.lstrip()[:1] in ("[", "{"):  # lists and objects are sent as JSON text
            with suppress(ValueError, RecursionError):
                yield from _texts(json.loads(plain))
    elif isinstance(plain, dict):
        for key, item in cast("dict[str, Any]", plain).items():
            # A key of letters only is the name of a field, such as "password", and no secret.
            yield from _texts([item] if key.replace("_", "").isalpha() else [key, item])
    elif isinstance(plain, list):
        for item in cast("list[Any]", plain):
            yield from _texts(item)
    elif plain is not None and not isinstance(plain, bool):
        yield str(plain)


@lru_cache(maxsize=16)  # all rows of a batch have the same tokens
def _forms(text: str) -> set[str]:
    """Return the forms that a secret may have in a text: stripped of blanks, or escaped for JSON, HTML or a URL."""
    plain = {text, text.strip()}
    forms = {*plain, *(repr(form)[1:-1] for form in plain)}
    for _ in range(2):  # an error may quote the JSON of a request within the JSON of its own
        forms |= {json.dumps(form, ensure_ascii=escaped)[1:-1] for form in forms for escaped in (True, False)}
    forms |= {html.escape(form, quote=marks) for form in forms for marks in (True, False)}
    for name, number in (("&#x27;", "&#39;"), ("&quot;", "&#34;")):
        forms |= {form.replace(name, number) for form in forms}
    return forms | {quote(form, safe=safe, errors="replace") for form in plain for safe in ("", "/")}


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
