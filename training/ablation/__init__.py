"""The normalization laboratory: many cells trained alike and compared honestly."""
