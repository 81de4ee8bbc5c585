"""``python -m feeder.doctor``: whether this machine has what a run needs, and what to do if not."""
