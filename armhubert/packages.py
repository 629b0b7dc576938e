"""Packages that may be missing, or not fit the others."""

import importlib
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch.torch_version import TorchVersion

from armhubert.errors import ArmhubertError


def require(*packages: str, extra: str) -> None:
    """Raises:
    ArmhubertError: one of them is not installed; the message names the extra that brings it.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ArmhubertError(f'{" and ".join(missing)} must be installed for this: pip install "armhubert[{extra}]"')


def import_torchaudio(module: str = "torchaudio") -> Any:
    """A module of torchaudio, whose wheels fit some versions of PyTorch only and do not tell pip which.

    Raises:
        ArmhubertError: the one installed does not load.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        fits = "torchaudio==2.11.0" if TorchVersion(torch.__version__) < "2.13" else "torchaudio>=2.11.1"
        raise ArmhubertError(
            f"torchaudio {version('torchaudio')} does not load beside PyTorch {torch.__version__}: "
            f'pip install "{fits}" gives one that does'
        ) from error
