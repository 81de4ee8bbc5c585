"""A conversation on a terminal, in the engine's process."""
