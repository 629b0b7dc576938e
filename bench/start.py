"""How long a user waits before anything happens: whole processes, from their start to their end.

python              the interpreter alone
import torch        what no package of ours can go below
import, load        `import armhubert`, and the preset armhubert from a folder
--help              of the command line and of each command
"""

import functools
import subprocess
import sys
import tempfile

import torch
from rich.console import Console
from rich.table import Table

from armhubert.bench import output
from armhubert.cli.app import app
from armhubert.clock import interleave
from armhubert.config import preset
from armhubert.student import ARMHuBERT

_LOAD = "from armhubert import ARMHuBERT; ARMHuBERT.from_pretrained({!r})"


def commands(student: str) -> dict[str, list[str]]:
    """What is started, by name."""
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    helps = {f"armhubert {name} --help".replace("  ", " "): [*name.split(), "--help"] for name in ("", *sorted(names))}
    return {
        "python": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "import, load": ["-c", _LOAD.format(student)],
        **{name: ["-m", "armhubert.cli", *argv] for name, argv in helps.items()},
    }


def _run(argv: list[str]) -> None:
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure, print, and write start.json."""
    parser = output.parser("start", __doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng([]):
        ARMHuBERT(preset("armhubert")).save_pretrained(folder)
        runs = {name: functools.partial(_run, argv) for name, argv in commands(folder).items()}
        timings = interleave(runs, repeats=options.repeats)
    table = Table("process", "seconds")
    for name, t in timings.items():
        table.add_row(name, f"{t.median:.2f} ({t.low:.2f}-{t.high:.2f})")
    Console(width=120).print(table)
    rows = [{"process": name, **timing._asdict()} for name, timing in timings.items()]
    print(output.write_results("start", rows, torch.device("cpu"), options.out))
