"""`python -m armhubert.bench NAME [OPTIONS]`: run one benchmark or report."""

import importlib
import sys

NAMES = (
    "compare_runs",
    "cpu",
    "fuzz",
    "gpu",
    "loader",
    "lowering",
    "model",
    "report",
    "start",
    "superb",
    "teacher_views",
)

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m armhubert.bench {{{','.join(NAMES)}}} [OPTIONS]")
    importlib.import_module(f"armhubert.bench.{sys.argv.pop(1)}").main()
