"""What `--sample`, `--sample-seed` and `--time-limit` do: a part of the slow tests, chosen by a seed, within a time."""

from __future__ import annotations

import random
import time

import pytest

__all__ = ["add_options", "describe", "keep_sample", "skip_if_late"]

_start = time.monotonic()


def add_options(parser: pytest.Parser) -> None:
    """Add the three options to pytest's command line."""
    group = parser.getgroup("prefect-crew")
    group.addoption(
        "--sample",
        type=int,
        metavar="N",
        help="of the tests marked `sampled`, run N chosen by the seed",
    )
    group.addoption(
        "--sample-seed", type=int, metavar="S", default=random.randrange(10**6), help="seed of the choice; printed"
    )
    group.addoption(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="skip, and say so, what would begin later than this",
    )


def keep_sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop all but N of the `sampled` tests from `items`, and put those that stay last."""
    size: int | None = config.getoption("sample")
    if size is None:
        return
    # Sorted, so that a seed means the same tests whatever the order of collection is.
    candidates = sorted((item for item in items if item.get_closest_marker("sampled")), key=lambda item: item.nodeid)
    chosen = random.Random(config.getoption("sample_seed")).sample(candidates, min(size, len(candidates)))
    dropped = set(candidates) - set(chosen)
    # The time limit cuts from the end: what is one of many goes first.
    items[:] = [item for item in items if item not in set(candidates)] + [item for item in candidates if item in chosen]
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
    config.stash[_KEPT] = (len(chosen), len(candidates))


_KEPT = pytest.StashKey[tuple[int, int]]()


def describe(config: pytest.Config) -> str | None:
    """Return the line that says what was chosen and how to choose it again, None without `--sample`."""
    if _KEPT not in config.stash:
        return None
    kept, total = config.stash[_KEPT]
    size, seed = config.getoption("sample"), config.getoption("sample_seed")
    return f"sample: {kept} of {total} tests marked `sampled`; the same again: --sample {size} --sample-seed {seed}"


def skip_if_late(config: pytest.Config) -> None:
    """Skip the test that is about to begin if the time limit is over."""
    limit: float | None = config.getoption("time_limit")
    if limit is not None and time.monotonic() - _start > limit:
        pytest.skip(f"needs more time: the limit of {limit:g} seconds was over before it began")
