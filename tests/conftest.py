import os
import sys

import pytest
import torch

# No test may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws depends on no other test."""
    torch.manual_seed(0)


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """Run `armhubert ...` in this process, in tmp_path: exit code, standard output, standard error."""
    from armhubert import cli  # after the environment above is set

    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["armhubert", *map(str, argv)])
        monkeypatch.setenv("COLUMNS", "100")
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return run
