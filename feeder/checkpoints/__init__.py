"""Checkpoints of every kind that can become a store: one small file for each."""
