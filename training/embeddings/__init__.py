"""Embedding tables over devices and processes: what can be asked for, the plan, the shards, managed ids' rows."""
