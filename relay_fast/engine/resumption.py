"""How a pass of a block begins: iterations before it, what injection adds, and the random seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from relay_fast.batch.plan import Plan, check_floating
from relay_fast.config import BlockConfig
from relay_fast.engine.block_iteration import BlockIteration
from relay_fast.engine.spec import LoopSpec
from relay_fast.utils.numbers import as_int, check_int64


@dataclass(frozen=True)
class Entry:
    """The beginning of a pass.

    Args:
        start: number of iterations that the state has been through.
        inject: (rows, d), what injection adds instead of the loop's input; None: the input.
        seed: () int64, of the dropout masks and the state noise; None: the pass's own.
    """

    start: int = 0
    inject: Tensor | None = None
    seed: Tensor | None = None

    @staticmethod
    def of(
        config: BlockConfig,
        x: Tensor,
        inject: Tensor | None,
        start: int,
        seed: int | Tensor | None,
    ) -> Entry:
        """Checks a caller's options.

        Args:
            config: of the block.
            x: the first state.
            inject, start, seed: as in `LoopedBlock.forward`.

        Raises:
            ValueError, TypeError: if they do not fit the block or x.
        """
        start = as_int("start", start, least=0)
        if seed is not None and not isinstance(seed, Tensor):
            seed = check_int64("seed", as_int("seed", seed))
            seed = torch.tensor(seed, dtype=torch.int64, device=x.device)
        if inject is None:
            return Entry(start, None, seed)
        if config.injection == "none":
            raise ValueError(
                "inject is given, but the block was built with injection='none': use 'add' or "
                "'concat'"
            )
        if not isinstance(inject, Tensor) or inject.shape != x.shape:
            raise ValueError(
                f"inject has shape {tuple(getattr(inject, 'shape', ()))} but x has "
                f"{tuple(x.shape)}: pass the same"
            )
        check_floating(inject, "inject")
        return Entry(start, inject.to(x.dtype).reshape(-1, x.shape[-1]), seed)

    def sorted(self, plan: Plan) -> Entry:
        """Returns it with rows in the plan's order."""
        return self if self.inject is None else replace(self, inject=self.inject[plan.to_sorted])

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that follow the block's parameters in the engine's list."""
        return [] if self.inject is None else [self.inject]

    def enter(self, spec: LoopSpec, config: BlockConfig) -> LoopSpec:
        """Returns the pass of a block that begins so. Raises ValueError if its iterations are more
        than the loop-index embedding holds."""
        if not self.start and self.inject is None and self.seed is None:
            return spec
        check_max_loops(config, spec.plan, self.start)

        def make_iteration(x: Tensor, parameters: Sequence[Tensor | None]) -> BlockIteration:
            entering = x if self.inject is None else parameters[-1]
            body = spec.make_iteration(entering, parameters)
            body.start = self.start
            if self.inject is not None:
                body.inject_index = len(parameters) - 1
            if self.seed is not None and body.seed is not None:
                body.seed = self.seed
            return body

        return spec.with_iterations(make_iteration)


def check_max_loops(config: BlockConfig, plan: Plan, start: int = 0) -> None:
    """Checks that the loop-index embedding has an entry for every iteration.

    Args:
        config: The block's config.
        plan: The plan of the batch.
        start: Iterations that ran earlier.

    Raises:
        ValueError: The plan loops more often.
    """
    if config.max_loops and start + plan.limit > config.max_loops:
        asked = f"start + loops = {start} + {plan.limit}" if start else f"loops = {plan.limit}"
        raise ValueError(
            f"{asked} is more than the {config.max_loops} iterations that the loop-index embedding "
            "holds: build the block with a larger max_loops"
        )
