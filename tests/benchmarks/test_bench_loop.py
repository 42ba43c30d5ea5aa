"""The overhead of `relay_fast.loop` around a tiny module: pytest tests/ --benchmark-only."""

from benchmarks import micro


def test_overhead_of_a_tiny_module(benchmark, request) -> None:
    timed = request.config.getoption("benchmark_only")  # else the machine is busy with other tests
    ratio = benchmark.pedantic(micro.tiny_module_ratio, args=(30 if timed else 1,), rounds=1)
    benchmark.extra_info["relay_fast.loop / Python"] = ratio
    assert 0 < ratio <= micro.TINY_RATIO or not timed
