"""Offline evaluation: what a model's scores of labelled rows are worth, alone or beside another model's."""
