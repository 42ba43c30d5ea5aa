"""The kernels of relay_fast, installed and imported as `relay_fast.kernels`.

Each op is a pair of files: `<op>_ref.py` in plain torch, forward and a backward written by hand,
for any dtype; `<op>.py` in Triton. The first is the truth in tests, the path of a CPU, and the
baseline of benchmarks. `relay_fast.ops.dispatch` chooses; `relay_fast.explain(device)` says which
implementation serves, and why. `impl="auto"` is the default, `impl="torch"` takes the references,
`impl="triton"` raises with the reason where a kernel cannot serve.

## Kernels and their status

| kernel | covers | interpreted | compiled | run on a card |
|---|---|---|---|---|
| norm_linear | RMSNorm, LayerNorm, bias, RoPE; fused to d 512 | yes | yes | H200 |
| qk_norm | RMSNorm of each query and key head, then RoPE | yes | yes | H200 |
| norm_residual | sandwich norms: norm of a branch, dropout, residual | yes | yes | H200 |
| state_input | state + injected input + loop embedding | yes | yes | no |
| attention | short (≤ 128 rows) and long, both masks, GQA, head_dim 8–128 | yes | yes | H200 |
| linear_residual | bias, dropout; d ≤ 512 | yes | yes | H200 |
| mlp | 4 activations; one launch to d 256, 2 for few rows or to d 512 | yes | yes | H200 |
| cross_entropy | V ≤ 1,024 in one pass, split to 262,144; smoothing, z-loss | yes | yes | H200 |
| weight_grad | deterministic, fp32 sums; iterations in one launch | yes | yes | earlier form |
| loop | whole loop in one launch, inference; d, tokens ≤ 128 | yes | yes | failed, mended |

"Interpreted" is Triton's interpreter against the reference in fp32, fp16 and bf16. "Compiled" is
ahead of time, by default for sm_80, 86, 89, 90, 100 and 120 (`benchmarks/compile_report.py` prints
registers, spills, shared memory and matrix instructions of each launch configuration). A
configuration is only picked if it fits the shared memory that the device reports. In fp32 mlp is
one kernel to d 128 and two to d 256, where it has no SwiGLU, and loop takes d ≤ 64 and 32 tokens.
Where d and tokens are both over 64, loop takes head_dim to 32. On the card it read beyond its
shared memory, through descriptors that ptxas 12.8 took from registers that it had not written. It
has others now, and is refused on GPUs until one has shown it right (`RELAY_FAST_WHOLE_LOOP=1` tries
it). Where it serves, it takes blocks without biases, injection, loop embedding, QK-norm or sandwich
norms.

Above V 1,024 `relay_fast.functional.iteration_cross_entropy` forms the gradient in forward. On a
GPU `auto` leaves 16-bit attention over sequences of more than 128 tokens to flash-attn where it is
installed, else to torch's variable-length attention. Kernels take `row_count`, a count on the
device, so that one CUDA graph serves smaller batches too. `RELAY_FAST_AUTOTUNE=1` searches launch
configurations and prints their rows for `relay_fast.kernels.tuning`.

## Numerics

- The reference in fp64 is the truth; its backward is checked against autograd to 1e-10 of the
  largest element, and so is the engine, for every policy, mask, injection and truncation.
- A kernel in fp32 agrees to an RMS ratio of 1e-5. In 16 bits its largest error is at most twice
  (fp16) or four times (bf16, interpreted) that of eager PyTorch in the same dtype.
- Operands stay in their storage dtype, accumulators are fp32, TF32 is never used. The state is fp32
  by default; in bf16 it is rounded at each iteration's boundary in forward too, so that
  recomputation is exact.
- Two runs give the same bits: there are no float atomics.
- `benchmarks/error_growth.py` compares the error after 30 iterations with plain torch's.

## The folder

In a checkout this folder is also importable as a top-level `kernels`, a name that other libraries
probe for (transformers looks for Hugging Face's package of that name and its version). Nothing is
exported or raised here, so that they find no version and continue. Import the modules of
`relay_fast.kernels` one by one.
"""

__version__ = "0"
