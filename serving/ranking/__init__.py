"""The ranking engine: requests of raw values into scores, without any notion of HTTP."""
