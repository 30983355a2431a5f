"""The order of probes under a time budget: the one place that knows it."""
