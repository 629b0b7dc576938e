"""`python -m armhubert.cli`, for torchrun."""

from armhubert.cli import main

main()
