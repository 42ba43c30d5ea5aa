"""Old places: a module that moved is named by the error that its import raises, and packages that
were modules forward what was taken from them."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

MOVED = {
    "relay_fast._cores": "relay_fast.utils.cores",
    "relay_fast._files": "relay_fast.utils.files",
    "relay_fast._inference": "relay_fast.decoding._inference",
    "relay_fast.block": "relay_fast.engine.block_iteration",
    "relay_fast.chain_parts": "relay_fast.relay.resumable_chains",
    "relay_fast.checkpoint": "relay_fast.utils.tensor_files and relay_fast.training.checkpoint",
    "relay_fast.compiled": "relay_fast.engine.compile_op",
    "relay_fast.compiled_loss": "relay_fast.ops.cross_entropy",
    "relay_fast.datasets": "relay_fast.data.sample_files",
    "relay_fast.decode": "relay_fast.decoding.autoregressive",
    "relay_fast.decode_step": "relay_fast.decoding.step",
    "relay_fast.dispatch": "relay_fast.ops.dispatch",
    "relay_fast.display": "relay_fast.reporting.progress",
    "relay_fast.generate_command": "relay_fast.generate",
    "relay_fast.gradients": "relay_fast.ops.gradients",
    "relay_fast.growth": "relay_fast.models.layer_stack",
    "relay_fast.kv_cache": "relay_fast.decoding.kv_cache",
    "relay_fast.layer_ops": "relay_fast.ops.layers",
    "relay_fast.linear_attention": "relay_fast.recipes._linear_attention",
    "relay_fast.looped_classifier": "relay_fast.models.classifier",
    "relay_fast.looped_lm": "relay_fast.decoding.language_model",
    "relay_fast.loss": "relay_fast.models.iteration_loss",
    "relay_fast.module_loop": "relay_fast.engine.module_loop",
    "relay_fast.modules": "relay_fast.models.transformers and relay_fast.models.looped_block",
    "relay_fast.optim": "relay_fast.training.optim",
    "relay_fast.pipeline": "relay_fast.relay.pipeline",
    "relay_fast.plan": "relay_fast.batch.plan",
    "relay_fast.plots": "relay_fast.reporting.plots",
    "relay_fast.policy": "relay_fast.engine.recompute",
    "relay_fast.primitives": "relay_fast.recipes._primitives",
    "relay_fast.ragged": "relay_fast.utils.ragged",
    "relay_fast.regularizer": "relay_fast.models.layer_stack",
    "relay_fast.report": "relay_fast.reporting.tables",
    "relay_fast.runs": "relay_fast.relay.run_folder",
    "relay_fast.schedule": "relay_fast.training.schedule and relay_fast.data.streams",
    "relay_fast.scores": "relay_fast.decoding.scores",
    "relay_fast.stack": "relay_fast.models.layer_stack",
    "relay_fast.stages": "relay_fast.relay.stages",
    "relay_fast.static": "relay_fast.batch.capacity",
    "relay_fast.step_body": "relay_fast.decoding.cached_block",
    "relay_fast.store": "relay_fast.training.model_files",
    "relay_fast.trainer": "relay_fast.training.trainer",
    "relay_fast.trust": "relay_fast.relay.filter_metrics",
    "relay_fast.verify": "relay_fast.tasks.verify",
    "relay_fast.whole_loop": "relay_fast.engine.fused_inference",
}

# Old name -> new name, for what is forwarded from an old path.
RENAMED = {
    "relay_fast.data": {"Form": "BatchFormat", "run_ahead": "prefetch"},
    "relay_fast.engine": {"Body": "Iteration", "Run": "LoopSpec"},
    "relay_fast.evaluate": {
        "Marks": "Grades",
        "mark_autoregressive": "grade_autoregressive",
        "mark_looped": "grade_looped",
    },
    "relay_fast.generate": {
        "Scores": "ChainLogProbs",
        "generate_chains": "generate_looped_chains",
        "read_chains": "parse_chains",
        "write_chains": "generate_ar_chains",
    },
}


class _MovedPaths:
    """The last finder on sys.meta_path: asked for what no other one finds."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> None:
        if name in MOVED:
            raise ModuleNotFoundError(f"{name} moved to {MOVED[name]}: import it from there")


def name_moved_paths() -> None:
    """Lets the import of a module that moved say where it is now."""
    if not any(getattr(finder, "__name__", "") == "_MovedPaths" for finder in sys.meta_path):
        sys.meta_path.append(_MovedPaths)


def forward(module: str, *homes: str) -> Callable[[str], Any]:
    """Makes a module's `__getattr__` that looks names up in the modules `homes`.

    A renamed one is found under its old name too, with one DeprecationWarning.
    """
    renamed = RENAMED.get(module, {})

    def find(name: str) -> Any:
        if not name.startswith("__"):
            current = renamed.get(name, name)
            for home in map(importlib.import_module, homes):
                if hasattr(home, current):
                    value = getattr(home, current)
                    if current != name:
                        from relay_fast.utils.deprecation import warn_renamed

                        warn_renamed(f"{module}.{name}", f"{home.__name__}.{current}")
                        # A `from` import of a package asks twice.
                        setattr(sys.modules[module], name, value)
                    return value
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find
