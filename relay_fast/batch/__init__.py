"""Batches without padding: their plan, the packed batch, and batches of fixed capacity."""

from relay_fast._moved_paths import forward

__getattr__ = forward(__name__, "relay_fast.batch.packed", "relay_fast.batch.plan")
