"""`python -m armhubert.bench <name>`: run one benchmark or report."""

import importlib
import sys

NAMES = ("lowering",)

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m armhubert.bench {{{','.join(NAMES)}}}")
    importlib.import_module(f"armhubert.bench.{sys.argv[1]}").main()
