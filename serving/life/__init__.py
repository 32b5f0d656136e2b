"""A running service's models: following an alias, the local cache, challenger and shadow."""
