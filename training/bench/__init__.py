"""Benchmarks that run where the work does: on machines with a GPU, which may have little else installed."""
