"""What a running service tells: metrics, the log of predictions, drift."""
