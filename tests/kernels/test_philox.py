import pytest
import torch
from oracle import DEVICE

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from armhubert.kernels.triton_reuse_attention import ROUNDS, _philox  # noqa: E402


@triton.jit
def _both(seed_ptr, counters_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    seed = tl.load(seed_ptr)
    c0 = tl.load(counters_ptr + n).to(tl.uint32, bitcast=True)
    c1 = tl.load(counters_ptr + N + n).to(tl.uint32, bitcast=True)
    c2 = tl.load(counters_ptr + 2 * N + n).to(tl.uint32, bitcast=True)
    ours = _philox(seed, c0, c1, c2, c2 * 0)
    theirs = tl.philox(seed, c0, c1, c2, c2 * 0, ROUNDS)
    for word in tl.static_range(4):
        tl.store(out_ptr + word * N + n, ours[word].to(tl.int32, bitcast=True))
        tl.store(out_ptr + (4 + word) * N + n, theirs[word].to(tl.int32, bitcast=True))


@pytest.mark.needs_triton
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5, 2**63 - 1])
def test_draws_are_philox(seed):
    generator = torch.Generator().manual_seed(seed % 1000)
    counters = torch.randint(-(2**31), 2**31, (3, 64), generator=generator, dtype=torch.int32).to(DEVICE)
    out = counters.new_empty(2, 4, 64)
    _both[(1,)](torch.tensor([seed], device=DEVICE), counters, out, 64)
    assert torch.equal(out[0], out[1])
    assert len(out[0].unique()) > 250
