"""Which implementation serves a tensor: what the kernels were never compiled for is not given to them."""

from types import SimpleNamespace

import pytest
import torch

from armhubert.kernels import runtime


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "torch"), ((8, 0), "triton"), ((10, 0), "triton")])
def test_auto_takes_triton_from_ampere_on(capability, chosen, compiling, monkeypatch):
    monkeypatch.setattr(runtime, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=torch.float32)
    assert runtime.resolve_impl("auto", x) == chosen
    if chosen == "torch":
        with pytest.raises(ValueError, match=r"compute capability 8\.0"):
            runtime.resolve_impl("triton", x)


def test_a_compiler_can_trace_the_choice(monkeypatch):
    monkeypatch.setattr(runtime, "_capability", lambda device: (7, 5))

    def recent(x):
        return x + 1 if runtime._recent(0) else x

    assert torch.compile(recent, fullgraph=True, backend="aot_eager")(torch.zeros(2)).sum() == 0
