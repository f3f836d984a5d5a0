"""`prefect-crew`, the program."""

from prefect_crew.cli.app import main

__all__ = ["main"]
