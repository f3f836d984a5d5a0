"""What the tests run for real: Prefect servers, workers, PostgreSQL and Chromium. Import it as `support`."""
