"""Run records: the facts about each run that are stored on the Prefect server."""
