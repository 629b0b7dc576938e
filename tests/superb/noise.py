"""Recordings of noise."""

from pathlib import Path

import numpy as np
import soundfile


def write_wave(path: Path, seconds: float = 0.5, seed: int = 0, level: float = 0.1) -> Path:
    """Noise of one length, another for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(size=int(16_000 * seconds)) * level
    soundfile.write(path, noise.astype(np.float32), 16_000)
    return path
