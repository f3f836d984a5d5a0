"""The receiver of webhooks, in parts. `prefect_crew.webhooks` is its public place."""
