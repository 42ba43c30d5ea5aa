"""The loop engine: recompute policies, one iteration of a block or of any module, the compiled
op."""

from relay_fast._moved_paths import forward

__getattr__ = forward(__name__, "relay_fast.engine.loop", "relay_fast.engine.spec")
