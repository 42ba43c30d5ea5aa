"""Training data: sample files, streams of batches, and collation of samples into batches."""

from relay_fast._moved_paths import forward

__getattr__ = forward(__name__, "relay_fast.data.streams")
