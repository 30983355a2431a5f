"""Measure: one file a question, independent of one another. A probe returns raw numbers and concludes nothing."""
