"""The empirical check: training to a target at several batch sizes, with the rate tuned at each."""
