"""A step of distillation on this CPU in float32, HuBERT Base to the preset armhubert, against a straightforward loop:
two teacher passes, PyTorch's own attention, convolutions and linear maps, the loss layer by layer.

On a GPU it is a stage of `bench/gpu.sh`; inference is `armhubert profile`, and where a step's time goes
`armhubert profile --training`.
"""

import torch
from rich.console import Console
from rich.table import Table

from armhubert.bench import output
from armhubert.bench.gpu_model import Job, work


def main() -> None:
    """Time a step of distillation on this CPU, print it, and write distillation-step.json."""
    parser = output.parser("model", __doc__)
    parser.add_argument("--batch", type=int, default=4, help="utterances")
    parser.add_argument("--seconds", type=float, default=5.0, help="of audio an utterance")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; all cores where not given")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    row = work(Job("distillation", options.batch, "cpu", False, seconds=options.seconds, repeats=options.repeats))
    ours = row["candidates"]["ours"]["median"]
    table = Table("way", "seconds a step", "times ours")
    for name, c in row["candidates"].items():
        table.add_row(name, f"{c['median']:.3f} ({c['low']:.3f}-{c['high']:.3f})", f"{c['median'] / ours:.2f}")
    console = Console(width=120)
    console.print(table)
    for name, why in row["failed"].items():
        console.print(f"{name} failed: {why}", markup=False)
    print(output.write_results("distillation-step", [row], torch.device("cpu"), options.out))
