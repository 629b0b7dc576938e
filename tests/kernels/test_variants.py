import pytest
import torch

from armhubert.kernels import attend, costs, variants


def row(B: int, T: int, inside: float, outside: float, stored: float, storing: float = 0.5) -> dict[str, float]:
    return {"B": B, "T": T, "inside_s": inside, "outside_s": outside, "stored_s": stored, "storing_s": storing}


def test_a_table_from_measurements():
    table = variants.table([row(1, 50, 1, 2, 3), row(1, 100, 3, 2, 1), row(1, 200, 1, 2, 0.9), row(4, 50, 2, 1, 0.1)])
    assert table["inside"] == [[1, 50], [4, 0]], "what wins again after it lost was chance"
    assert table["stored"] == [[1, 50, 0], [1, 100, 1], [1, 200, 8], [4, 50, 1]]


def test_a_lookup_takes_the_next_larger_cell(monkeypatch):
    table = variants.table(
        [row(1, 50, 1, 2, 3), row(1, 100, 3, 2, 1, storing=1.5), row(4, 100, 1, 2, 0.5, storing=0.1)]
    )
    monkeypatch.setattr(variants, "choices", lambda device, itemsize: table)

    def of(B, T):
        q = torch.empty(B, T, 12, 40, dtype=torch.bfloat16)
        return variants.project_inside(q), [n for n in range(4) if variants.store_map(q, n)]

    assert of(1, 20) == (True, [])
    assert of(1, 60) == (False, [2, 3])
    assert of(2, 100) == (True, [1, 2, 3])
    assert of(64, 100) == (True, []), "beyond the grid nothing is stored"
    assert of(4, 101) == (False, [])


def test_a_stored_map_is_bounded(monkeypatch):
    monkeypatch.setattr(variants, "choices", lambda *_: {"inside": [[1, 0]], "stored": [[99, 99999, 1]]})
    assert variants.store_map(torch.empty(1, 3000, 12, 40, dtype=torch.bfloat16), 1)
    assert not variants.store_map(torch.empty(1, 6000, 12, 40, dtype=torch.bfloat16, device="meta"), 1)


@pytest.mark.parametrize("name", costs.GPUS)
def test_what_the_model_says(name):
    """Storing makes the logits twice, so one reusing layer never repays it; without matrix units several do."""
    gpu = costs.GPUS[name]
    low, single = (variants.table(variants.predicted(gpu, itemsize)) for itemsize in (2, 4))
    assert {n for *_, n in low["stored"]} == {0}
    assert {n for *_, n in single["stored"]} <= {0, *range(2, 64)}
    assert [64, 1024, 2] in single["stored"]
    assert all(50 <= longest <= 256 for _, longest in low["inside"])


def test_a_device_is_known_by_its_name():
    assert costs.named("NVIDIA H100 80GB HBM3") == costs.GPUS["H100"]
    assert costs.named("NVIDIA A100-SXM4-80GB") == costs.GPUS["A100"]
    assert costs.named("Tesla T4") is None


def test_compilers_get_no_choice_by_shape():
    seen = []

    def pair(q):
        seen.append((variants.project_inside(q), variants.store_map(q, 9)))
        return attend(q, q, q, impl="torch")[0]

    torch.compile(pair, fullgraph=False, backend="eager")(torch.zeros(1, 4, 1, 4))
    assert seen == [(False, False)]
