"""The record of a training: to disk at once, from there to MLflow in the background. Rank 0 only."""
