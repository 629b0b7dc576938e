"""Recordings of noise, a corpus of them, and a model for them."""

from pathlib import Path

import numpy as np
import soundfile

UPSTREAM = """
import torch

class Model(torch.nn.Module):
    hop = 400

    def __init__(self):
        super().__init__()
        weight = torch.arange(400 * 6, dtype=torch.float32).view(6, 400)
        self.weight = torch.nn.Parameter(torch.sin(weight * weight * 0.01))

    def forward(self, waveforms, lengths):
        frames = torch.nn.functional.pad(waveforms, (0, -waveforms.shape[1] % 400)).unflatten(1, (-1, 400))
        layer = frames @ self.weight.T
        return [layer, layer.tanh()], -(-lengths // 400)

def make():
    return Model()
"""


def write_wave(path: Path, seconds: float = 0.5, seed: int = 0, level: float = 0.1) -> Path:
    """Noise of one length, another for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(size=int(16_000 * seconds)) * level
    soundfile.write(path, noise.astype(np.float32), 16_000)
    return path


def librispeech(root, waves, **subsets):
    """subset=number of utterances: two speakers in turn, transcripts of HELLO and CAT."""
    for subset, count in subsets.items():
        folder = root / subset.replace("_", "-")
        for number in range(count):
            chapter = folder / str(10 + number % 2) / "1"
            key = f"{10 + number % 2}-1-{number:04d}"
            waves(str((chapter / f"{key}.wav").relative_to(root)))
            with open(chapter / f"{10 + number % 2}-1.trans.txt", "a") as file:
                file.write(f"{key} {('HELLO CAT', 'CAT')[number % 2]}\n")
    (root / "lexicon.txt").write_text("HELLO\tHH AH0 L OW1\nHELLO(2)\tHH EH0 L OW1\nCAT\tK AE1 T\n")
