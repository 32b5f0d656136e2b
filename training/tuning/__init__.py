"""Tuning: a search over configurations, the best of them trained anew with several seeds."""
