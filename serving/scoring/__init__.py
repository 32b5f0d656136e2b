"""Batch scoring: files in, files out."""
