"""Measurements that the README quotes. ``python -m bench PART…`` makes all of them: docs/bench.md."""
