"""Small data sets of noise, in the layouts that the readers take."""

from pathlib import Path

import pytest
import torch
from corpora import write_wave


@pytest.fixture
def waves(tmp_path):
    """waves("a/b.wav", ...) writes them below tmp_path and returns it."""

    def write(*names: str, seconds: float = 0.5) -> Path:
        for seed, name in enumerate(names):
            write_wave(tmp_path / name, seconds, seed)
        return tmp_path

    return write


@pytest.fixture
def filled():
    """Gives a module weights that are a function of their place alone, as the stored goldens had."""

    def fill(module: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for number, (_, parameter) in enumerate(sorted(module.named_parameters())):
                wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.37 + number)
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
                parameter.copy_((wave / fan_in**0.5).view(parameter.shape))
        return module

    return fill


@pytest.fixture
def golden_features():
    """[3, 30, 6] and lengths: what s3prl 0.4.18's modules were run on for the stored goldens."""
    place = torch.arange(3 * 30 * 6, dtype=torch.float64)
    features = (torch.sin(place * 0.11) * torch.cos(place * 0.007)).view(3, 30, 6).float()
    lengths = torch.tensor([30, 22, 17])
    for row, length in zip(features, lengths, strict=True):
        row[length:] = 0
    return features, lengths


@pytest.fixture
def shared_speech():
    """Real recordings, where the checkout has them."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "speech"
    if not folder.is_dir():
        pytest.skip("needs ../shared/speech")
    return folder
