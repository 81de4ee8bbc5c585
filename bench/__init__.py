"""Measurements that the README quotes. Each prints JSON with device, versions, command and commit."""
