"""Packages that may be missing, or not fit the others."""

import importlib
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch.torch_version import TorchVersion

from armhubert.errors import ArmhubertError, brief


def require(*packages: str, extra: str) -> None:
    """See that what an extra brings is installed.

    Raises:
        ArmhubertError: naming what is missing, and the extra.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ArmhubertError(f'{" and ".join(missing)} must be installed for this: pip install "armhubert[{extra}]"')


def import_torchaudio(module: str = "torchaudio") -> Any:
    """A module of torchaudio, whose wheels fit some builds of PyTorch only and do not tell pip which.

    Raises:
        ArmhubertError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # the last where they were built for two versions of CUDA
        fits = "torchaudio==2.11.0" if TorchVersion(torch.__version__) < "2.13" else "torchaudio>=2.11.1"
        if find_spec("torchaudio") is None:
            raise ArmhubertError(f'torchaudio must be installed for this: pip install "{fits}"') from None
        raise ArmhubertError(
            f"torchaudio {version('torchaudio')} does not load beside PyTorch {torch.__version__}: {brief(error)}; "
            f'pip install "{fits}", built for the same CUDA'
        ) from error
