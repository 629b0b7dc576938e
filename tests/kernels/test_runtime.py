"""Which implementation serves a tensor: what the kernels were never compiled for is not given to them."""

from types import SimpleNamespace

import numpy as np
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


def test_what_is_no_tensor_is_refused_in_one_short_line():
    with pytest.raises(ValueError, match="q must be a tensor, got ") as caught:
        runtime.check_tensors({"k": torch.zeros(1), "q": np.zeros((9, 9, 9))})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 80
    runtime.check_tensors({"bias": None}, optional=True)
    with pytest.raises(ValueError, match="bias must be a tensor, got None"):
        runtime.check_tensors({"bias": None})
