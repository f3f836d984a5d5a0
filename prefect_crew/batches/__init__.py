"""Batches: a data set in, one crew run a row, a ledger that forgets nothing, a report."""
