"""Whoever wants to see the batches of this process as they go on: the command line draws its progress from it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from prefect_crew.batches.standing import Standing

__all__ = ["BatchWatch", "tell_batch", "watch_batches"]

BatchWatch = Callable[[str, str, Standing | None], None]
"""Called with a batch's name, what it does (checking, running, finishing, done), and how it stands, once a second."""

_watches: list[BatchWatch] = []


@contextmanager
def watch_batches(watch: BatchWatch) -> Generator[None]:
    """Call `watch` for every batch that this process runs meanwhile, on whichever event loop runs it.

    It must be quick and must not raise.
    """
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def tell_batch(name: str, phase: str, standing: Standing | None = None) -> None:
    """Tell everyone who watches."""
    for watch in tuple(_watches):
        watch(name, phase, standing)
