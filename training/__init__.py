"""Training, evaluation, the registry and the command line."""
