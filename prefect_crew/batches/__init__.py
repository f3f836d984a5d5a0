"""Batches: a crew for each row of a data set, on the crew database."""
