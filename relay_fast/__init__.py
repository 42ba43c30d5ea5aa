"""relay_fast: fast looped transformers, and RELAY end to end.

```python
block = relay_fast.LoopedBlock(d_model=64, n_heads=4, n_layers=2)
h = block(x, loops=12)  # x and h are (B, n, 64)
```

Where to read on:

- `LoopedBlock`: the block and its options; `loop`: any module, looped.
- `relay_fast.engine`: what is computed and what is kept, in pictures; memory against T.
- `relay_fast.kernels`: the kernels, where each has run, numerics.
- `relay_fast.tasks`: a task of one's own, and when it is learned.
- `relay_fast.train`, `relay_fast.generate`, `relay_fast.evaluate`: RELAY's commands.
- `relay_fast.recipes`: examples to copy from, and experiments of related papers.

The import is fast and loads neither torch, CUDA nor triton: a public name is imported from its
module on first use.
"""

import importlib
import sys

from relay_fast._kernels_hook import attach_kernels
from relay_fast._moved_paths import name_moved_paths

attach_kernels(sys.modules[__name__])
name_moved_paths()

__version__ = "0.2.0"

# Public name -> the module that defines it; a public module maps to itself.
_PUBLIC = {
    "LoopedBlock": "relay_fast.models.looped_block",
    "LoopedTransformer": "relay_fast.models.transformers",
    "AutoregressiveTransformer": "relay_fast.models.transformers",
    "LoopedClassifier": "relay_fast.models.classifier",
    "PackedBatch": "relay_fast.batch.packed",
    "Plan": "relay_fast.batch.plan",
    "IterationCrossEntropy": "relay_fast.models.iteration_loss",
    "loop": "relay_fast.engine.module_loop",
    "StateChange": "relay_fast.engine.criteria",
    "CosineChange": "relay_fast.engine.criteria",
    "ReadoutEntropy": "relay_fast.engine.criteria",
    "ReadoutKL": "relay_fast.engine.criteria",
    "HaltingGate": "relay_fast.engine.criteria",
    "noise_state": "relay_fast.models.initial_state",
    "FixedDepth": "relay_fast.training.depth",
    "UniformDepth": "relay_fast.training.depth",
    "PoissonLogNormalDepth": "relay_fast.training.depth",
    "CurriculumDepth": "relay_fast.training.depth",
    "loop_regularizer": "relay_fast.models.layer_stack",
    "tie": "relay_fast.models.layer_stack",
    "grow": "relay_fast.models.layer_stack",
    "GrowthSchedule": "relay_fast.models.layer_stack",
    "explain": "relay_fast.functional",
    "warmup": "relay_fast.training.warmup",
    "memory_estimate": "relay_fast.training.memory",
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
