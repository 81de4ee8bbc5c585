"""Strategies: which weights should be in slots. Pure: the standard library and ``common``, no more."""
