"""What every test gets: the same random numbers each run, and no more threads than its share."""

import gc
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from types import SimpleNamespace

IN_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_XDIST_WORKER:
    # Set before torch and numba are imported; subprocesses inherit it.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

os.environ.pop("RELAY_FAST_AUTOTUNE", None)  # searches belong to no test
# Inductor compiles here: processes that it would start import torch for a kernel or two.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if not torch.cuda.is_available():
    # Before anything imports triton: without a GPU, kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEED = 0

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Whatever a shell starts in the background ignores Ctrl-C, which some tests send themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    if IN_XDIST_WORKER:
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need walk over it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed() -> int:
    """The seed that all generators were set to before this test; give it to explicit generators."""
    return SEED


@pytest.fixture(scope="module")
def quick_workers() -> Iterator[None]:
    """Training workers fork from one process that has imported what each of them would import."""
    multiprocessing.set_forkserver_preload(["relay_fast.relay.stages", "numba", "torch._dynamo"])
    context = multiprocessing.get_context("forkserver")
    parts = SimpleNamespace(
        get_context=lambda _: context, parent_process=multiprocessing.parent_process
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relay_fast.utils.worker_processes.multiprocessing", parts)
        yield


# A hook and not an autouse fixture: hypothesis objects to function-scoped fixtures.
def pytest_runtest_setup(item: pytest.Item) -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
