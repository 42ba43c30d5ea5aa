"""Samples on their way into a training: files of them, streams, and collation into batches."""

from relay_fast._moved_paths import forward

__getattr__ = forward(__name__, "relay_fast.data.streams")
