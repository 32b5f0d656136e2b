"""Promotion: who becomes champion, after which checks, and what is written down about it."""
