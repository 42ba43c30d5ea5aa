"""The loop engine: a block, or any module, applied T times as one autograd Function.

## What is computed: the active prefix

Sequences are packed end to end, without padding, and sorted by their loops, the longest first. The
sequences that still loop at iteration t are then the first rows of the state. Nothing is moved to
compact them, every op just gets fewer rows, and backward gets them back in the reverse order:

    tokens of   iteration  1   2   3   4   5
    A (5 loops)            ■   ■   ■   ■   ■
    A                      ■   ■   ■   ■   ■
    B (3 loops)            ■   ■   ■   ·   ·      ■  computed
    C (2 loops)            ■   ■   ·   ·   ·      ·  not computed; a padded loop does
    C                      ■   ■   ·   ·   ·
    D (1 loop)             ■   ·   ·   ·   ·

The work is the sum of tokens times loops, not the longest input times the most loops times the
batch. `relay_fast.batch.plan` works out all row counts on the host, before the first op. Where
`until` stops sequences early, they leave the same way (`relay_fast.engine.stopping`).

## What is kept: recompute policies

Between forward and backward the engine keeps states h_t, the residual stream after iteration t, and
computes the inside of an iteration again when its gradient is due. With T = 9:

    policy     h1  h2  h3  h4  h5  h6  h7  h8
    none       ●══ ●══ ●══ ●══ ●══ ●══ ●══ ●══    and everything inside the iterations
    state      ●   ●   ●   ●   ●   ●   ●   ●      each iteration is computed once more
    every:2    ○   ●   ○   ●   ○   ●   ○   ●      and the states between, too
    sqrt       ○   ○   ●   ○   ○   ●   ○   ○
    last:2     ○   ○   ○   ○   ○   ○   ●   ●

Gradients are the same bits under all of them. `budget:BYTES` and `auto` choose among them
(`relay_fast.engine.recompute` has the table of costs; `relay_fast.memory_estimate` gives bytes).

Weight gradients of all iterations go into one accumulator of each weight, in fp32, instead of T
temporaries that autograd would add up. `last:m` and `truncate` differ: the first keeps the last m
states and gives exact gradients, the second stops gradients there.

## Memory against T

MiB of a training step at equal lengths, fp32, 8 sequences, width 256, 3 layers, on two CPU cores
(`benchmarks/memory_vs_loops.py`, `benchmarks/results/memory_vs_loops.csv`):

| | T = 1 | 8 | 30 | 64 |
|---|---|---|---|---|
| eager, kept | 24.1 | 192.5 | 721.6 | 1539.3 |
| eager with a checkpoint an iteration, kept | 0.8 | 6.3 | 23.4 | 49.9 |
| `none`, kept | 16.1 | 126.4 | 472.9 | 1008.4 |
| `state`, kept | 0.8 | 3.4 | 11.6 | 24.4 |
| `sqrt`, kept | 0.8 | 1.5 | 2.3 | 3.4 |
| eager, peak | 26.5 | 195.2 | 724.3 | 1542.1 |
| `state`, peak | 35.0 | 39.0 | 47.6 | 60.4 |
| `sqrt`, peak | 35.0 | 39.0 | 42.0 | 45.0 |

The peak has a floor that does not grow with T: the inside of one iteration and the workspaces.

## Where to read on

`relay_fast.engine.loop` is the Function, `relay_fast.engine.block_iteration` one iteration of a
block as explicit ops, `relay_fast.engine.module_iteration` one of any module,
`relay_fast.engine.compile_op` the op that `torch.compile` sees.
"""

from relay_fast._moved_paths import forward

__getattr__ = forward(__name__, "relay_fast.engine.loop", "relay_fast.engine.spec")
