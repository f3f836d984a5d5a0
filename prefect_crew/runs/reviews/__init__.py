"""The questions of one run during a wait: the source of answers, and the form on the flow run's page."""
