"""Values of fields by key, so that a caller may send a key alone."""
