"""Binaries that several tests need are compiled once: Triton keeps them for the session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of processes whose kernels are compiled, with a cache that all workers share."""
    own = tmp_path_factory.getbasetemp()
    cache: Path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "triton"
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"TRITON_CACHE_DIR": str(cache)}
