"""What s3prl 0.4.18 imports and current torchaudio and huggingface_hub no longer have; import this before s3prl.

torchaudio 2.9 dropped its audio backends: files are read with soundfile, and the sox effects that s3prl's recipes ask
for (mono, resampling to 16 kHz) are left out, so give it 16 kHz mono files.
"""

import sys
import types
from typing import Any

import huggingface_hub
import soundfile
import torch
import torchaudio


def load(path: Any, frame_offset: int = 0, num_frames: int = -1, **_: Any) -> tuple[torch.Tensor, int]:
    """As torchaudio.load: [channels, samples] and the rate."""
    wave, rate = soundfile.read(str(path), num_frames, frame_offset, dtype="float32", always_2d=True)
    return torch.from_numpy(wave.T.copy()), rate


def info(path: Any, **_: Any) -> types.SimpleNamespace:
    """As torchaudio.info."""
    about = soundfile.info(str(path))
    return types.SimpleNamespace(num_frames=about.frames, sample_rate=about.samplerate, num_channels=about.channels)


effects: Any = types.ModuleType("torchaudio.sox_effects")
effects.apply_effects_tensor = lambda wave, rate, effects, **_: (wave, rate)
effects.apply_effects_file = lambda path, effects, **_: load(path)
sys.modules["torchaudio.sox_effects"] = effects
for name, stand_in in (
    ("sox_effects", effects),
    ("load", load),
    ("info", info),
    ("set_audio_backend", lambda _: None),
):
    setattr(torchaudio, name, stand_in)
for name in ("HfFolder", "Repository"):
    if not hasattr(huggingface_hub, name):
        setattr(huggingface_hub, name, type(name, (), {}))
