"""The crew database: the attempts, batches, questions, news, spending and workers of all crews, in SQL."""
