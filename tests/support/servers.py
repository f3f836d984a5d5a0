"""Types that the tests of the local crew server share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from prefect_crew.devserver.server import LocalServer

ClientOf = Callable[[LocalServer], httpx.Client]
"""Opens a plain HTTP client, with the token, for a server on a port."""

Finished = Callable[[httpx.Client, str], dict[str, Any]]
"""Polls a run until its state stays as it is, and returns the last status body."""
