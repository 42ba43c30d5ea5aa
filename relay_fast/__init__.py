"""relay_fast: fast looped transformers, and RELAY end to end.

Importing this package is quick and touches neither CUDA nor triton (nor torch): a public name is
looked up in the module that defines it when it is first used.
"""

import importlib
import sys

from relay_fast._kernels_hook import attach_kernels

attach_kernels(sys.modules[__name__])

__version__ = "0.1.0"

# Public name -> the module it comes from; a module stands for itself.
_PUBLIC = {
    "LoopedBlock": "relay_fast.modules",
    "LoopedTransformer": "relay_fast.modules",
    "AutoregressiveTransformer": "relay_fast.modules",
    "LoopedClassifier": "relay_fast.looped_classifier",
    "PackedBatch": "relay_fast.batch",
    "Plan": "relay_fast.batch",
    "IterationCrossEntropy": "relay_fast.loss",
    "loop": "relay_fast.module_loop",
    "loop_regularizer": "relay_fast.regularizer",
    "tie": "relay_fast.regularizer",
    "grow": "relay_fast.growth",
    "GrowthSchedule": "relay_fast.growth",
    "explain": "relay_fast.functional",
    "engine": "relay_fast.engine",
    "functional": "relay_fast.functional",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    source = _PUBLIC[name]
    module = importlib.import_module(source)
    value = module if source == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
