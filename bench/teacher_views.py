"""The teacher's two views of a batch: ours against two plain passes, same dtype, interleaved.

A plain loop runs the whole teacher twice, clean and masked, and keeps both views of every layer; `teacher_targets` runs
the front end once and both views as one batch, and keeps the view that each frame needs.
"""

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from armhubert.baselines import HUBERT_BASE
from armhubert.bench import output
from armhubert.clock import interleave
from armhubert.encoder import SpeechEncoder
from armhubert.machine import conditions, pick_device
from armhubert.teacher import teacher_targets


def measure(device: torch.device, *, batch: int, seconds: float, repeats: int) -> dict[str, Any]:
    """One row: seconds of both ways and their ratio, HuBERT Base on random weights."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        teacher = SpeechEncoder(HUBERT_BASE).eval().requires_grad_(False).to(device)
        waveforms = torch.randn(batch, int(seconds * 16_000)).to(device)
    frames = HUBERT_BASE.frames(waveforms.shape[1])
    mask = (torch.arange(frames, device=device) % 14 < 10).expand(batch, -1)
    layers = range(1, HUBERT_BASE.layers + 1)

    def plain() -> list[torch.Tensor]:
        clean = teacher(waveforms).hidden_states
        masked = teacher(waveforms, mask=mask).hidden_states
        return [torch.where(mask[..., None], a, b) for a, b in zip(clean[1:], masked[1:], strict=True)]

    def shared() -> tuple[torch.Tensor, ...]:
        targets = teacher_targets(teacher, waveforms, None, mask, layers).masking
        assert targets is not None
        return targets

    with torch.no_grad():
        error = max(float((a - b).abs().max()) for a, b in zip(plain(), shared(), strict=True))
        timings = interleave({"two plain passes": plain, "teacher_targets": shared}, repeats=repeats, device=device)
    two, one = timings["two plain passes"], timings["teacher_targets"]
    return {
        "teacher": "HuBERT Base, random weights",
        "dtype": "float32",
        "batch": batch,
        "seconds": seconds,
        "two_plain_passes_s": two,
        "teacher_targets_s": one,
        "speedup": two.median / one.median,
        "largest_difference": error,
    }


def main() -> None:
    """Measure, print, and write teacher-views.json."""
    parser = output.parser("teacher_views", __doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    device = pick_device(options.device)
    rows = [measure(device, batch=b, seconds=s, repeats=options.repeats) for b, s in ((1, 10.0), (4, 5.0))]
    table = Table("batch", "seconds", "two plain passes", "teacher_targets", "speed-up", "largest difference")
    for row in rows:
        two, one = row["two_plain_passes_s"].median, row["teacher_targets_s"].median
        table.add_row(
            str(row["batch"]), f"{row['seconds']:g}", f"{two:.3f} s", f"{one:.3f} s", f"{row['speedup']:.2f}x",
            f"{row['largest_difference']:.1e}",
        )  # fmt: skip
        row["two_plain_passes_s"], row["teacher_targets_s"] = (
            row[key]._asdict() for key in ("two_plain_passes_s", "teacher_targets_s")
        )
    console = Console()
    console.print(table)
    console.print(", ".join(f"{k} {v}" for k, v in conditions(device).items()))
    print(output.write_results("teacher-views", rows, device, options.out))
