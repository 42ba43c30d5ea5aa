"""Training by several processes: the same losses as by one, stopped and continued by others."""

from __future__ import annotations

import socket

import pytest
import torch

from relay_fast.training import ranks as ranks_module
from relay_fast.training import trainer
from relay_fast.training.ranks import (
    Ranks,
    agree,
    joined_ranks,
    own_device,
    ranks_wanted,
    speaks,
)
from relay_fast.utils.errors import RefusedTogether
from tests.support.rank_process import CASES, STEPS, run, start


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOG_EVERY", 0.0)
        return {case: run(case, folder, Ranks()) for case in CASES}


@pytest.mark.parametrize("size", [2, 3])
def test_losses_of_one_process(size, alone, tmp_path) -> None:
    cases = list(CASES) if size == 2 else ["sqrt", "fed"]
    by_rank = start(size, tmp_path, *cases)
    for case in cases:
        for found in by_rank:
            assert len(found[case]["losses"]) == STEPS
            assert found[case]["losses"] == pytest.approx(alone[case]["losses"], abs=1e-9, rel=0)
            assert found[case]["weights"] == pytest.approx(alone[case]["weights"], rel=1e-9)
        rows = by_rank[0][case]["rows"]
        assert min(rows) / sum(rows) >= 0.8 / size  # with two ranks, none below 40 %


def test_fewer_ranks_continue(alone, tmp_path) -> None:
    for size, case in ((3, "fed@9:1"), (2, "fed@20:0")):
        assert start(size, tmp_path, case) == [{case: {"interrupted": True}}] * size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOG_EVERY", 0.0)
        found = run("fed", tmp_path, Ranks())
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(alone["fed"]["losses"], abs=1e-9, rel=0)


TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_variables_of_torchrun_and_slurm() -> None:
    assert ranks_wanted({}) is None
    assert ranks_wanted({"SLURM_NTASKS": "4"}) is None  # inside sbatch, outside srun
    assert ranks_wanted(TORCHRUN) == TORCHRUN
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    slurm |= {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_JOB_ID": "41234"}
    found = ranks_wanted(slurm)
    assert found == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "21234",
    }


def test_a_process_alone_under_a_scheduler() -> None:
    assert ranks_wanted({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert ranks_wanted({"WORLD_SIZE": "1", "MASTER_ADDR": "here"}) is None
    with pytest.raises(ValueError, match="of torchrun is set but LOCAL_RANK is not"):
        ranks_wanted({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"})


def test_devices_of_processes(monkeypatch) -> None:
    found = TORCHRUN | {"LOCAL_RANK": "1"}
    assert [own_device(d, found) for d in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:1", "cuda:1"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RefusedTogether, match="'cuda:1' is a single one, but 2 processes share"):
        own_device("cuda:1", found)
    with pytest.raises(RefusedTogether, match="'cpu,cpu' names several, but each of the 2"):
        own_device("cpu,cpu", found)


def test_who_says_an_error() -> None:
    assert [speaks({"RANK": r}) for r in ("0", "1", "two", "")] == [True, False, True, True]
    assert speaks({}) and not speaks({"SLURM_PROCID": "3"})


def test_a_port_in_use_and_ranks_that_do_not_come(monkeypatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks_module, "JOIN", 0.2)

    def join(rank: int) -> str:
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(ValueError) as caught, joined_ranks("cpu"):
            pass
        assert isinstance(caught.value, RefusedTogether) == (rank == 0)
        return str(caught.value)

    with socket.socket() as taken, socket.socket() as free:
        for place in (taken, free):
            place.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert "the port is in use; give another" in join(0)
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
        assert "rank 1 of 2 did not reach rank 0 at 127.0.0.1:" in join(1)
    assert "rank 1 of 2 did not come to 127.0.0.1:" in join(0)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT is not: start with torchrun"),
        ({"RANK": "two"}, "RANK = 'two' is no number"),
        ({"RANK": "2"}, "RANK = 2 is not below WORLD_SIZE = 2"),
    ],
)
def test_variables_without_torchrun(change, message) -> None:
    environment = {k: v for k, v in (TORCHRUN | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        ranks_wanted(environment)


class Told(Ranks):
    """Ranks that told what a test says."""

    def __init__(self, *told):
        super().__init__(0, len(told))
        self.told = told

    def gather(self, value):
        return list(self.told)


def test_ranks_agree() -> None:
    fine = (None, {"config": "a"})
    agree(Told(fine, fine), lambda: None, {})
    with pytest.raises(ValueError, match=r"^rank 1: device cuda:9 is not there"):
        agree(Told(fine, ("device cuda:9 is not there", {})), lambda: None, {})
    with pytest.raises(ValueError, match="^no such task"):  # said once where all say it
        agree(Told(("no such task", {}), ("no such task", {})), lambda: None, {})
    with pytest.raises(ValueError, match=r"rank 1 has another config than rank 0 \('b', not 'a'\)"):
        agree(Told(fine, (None, {"config": "b"})), lambda: None, {})
    told = [(None, {"config": {"seed": seed, "model": {"d_model": 8}}}) for seed in (0, 3)]
    with pytest.raises(
        ValueError, match=r"config than rank 0 \(seed \(0 on rank 0, 3 on rank 1\)\)"
    ):
        agree(Told(*told), lambda: None, {})


def test_a_broken_connection_names_the_remedy() -> None:
    from relay_fast.training.ranks import lost_ranks
    from relay_fast.utils.errors import WorkerDied

    with pytest.raises(WorkerDied, match="the same command continues the run"):
        with lost_ranks():
            raise torch.distributed.DistNetworkError("Connection closed by peer")
