"""Run records: what is stored on the Prefect server about each run."""
