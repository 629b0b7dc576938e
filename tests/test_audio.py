import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from made import one_line

from armhubert import audio
from armhubert.audio import measure, read_audio, resample
from armhubert.errors import ArmhubertError

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def chirp(seconds: float, rate: int) -> np.ndarray:
    """A sweep, so that no two places sound alike and a misplaced part is far off. [S]"""
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 60 * time) * time)).astype(np.float32)


def write(path: Path, wave: np.ndarray, rate: int = 16_000, subtype: str | None = None) -> Path:
    kind, default = FORMATS[path.suffix[1:]]
    channels = 1 if wave.ndim == 1 else wave.shape[1]
    with soundfile.SoundFile(path, "w", rate, channels, subtype or default, format=kind) as file:
        for start in range(0, len(wave), 8_000):  # libsndfile's Vorbis encoder overflows its stack on a long write
            file.write(wave[start : start + 8_000])
    return path


def similar(got: torch.Tensor, want: np.ndarray, tolerance: float) -> bool:
    """Away from the ends, where the filter meets silence."""
    error = (got - torch.from_numpy(want))[400:-400].square().mean().sqrt()
    return float(error) < tolerance


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("suffix", FORMATS)
def test_reads_every_format_rate_and_channel_count_as_16_khz_mono(tmp_path, suffix, rate):
    if suffix == "opus" and rate == 44_100:
        rate = 48_000  # Opus knows no 44.1 kHz
    tone = chirp(3, rate)
    for channels in (1, 2):
        wave = tone if channels == 1 else np.stack([1.5 * tone, 0.5 * tone], axis=1)
        path = write(tmp_path / f"{channels}.{suffix}", wave, rate)
        got = read_audio(path)
        assert got.dtype == torch.float32
        assert got.shape == (48_000,)
        assert measure(path) == (48_000, "")
        assert similar(got, chirp(3, 16_000), 0.02)


@pytest.mark.parametrize(("rate", "seconds"), [(16_000, 34), (44_100, 2), (8_000, 2), (44_099, 2)])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_part_is_that_part_of_the_whole(tmp_path, suffix, rate, seconds):
    if (suffix == "opus" and rate > 16_000) or (suffix == "mp3" and rate == 44_099):
        pytest.skip("no such rate in this format")
    path = write(tmp_path / f"a.{suffix}", chirp(seconds, rate), rate)
    whole = read_audio(path)
    # A seek in a long Opus file leaves the decoder's state a little different; everything else is exact.
    tolerance = 4e-3 if suffix == "opus" and seconds > 30 else 0 if rate == 16_000 else 1e-6
    for start in (0, 1, 12_345, len(whole) - 9_000, len(whole) - 700):
        part = read_audio(path, start, 700)
        assert part.shape == (700,)
        assert (part - whole[start : start + 700]).abs().max() <= tolerance
    assert (read_audio(path, start) - whole[start:]).abs().max() <= tolerance
    assert read_audio(path, len(whole)).shape == (0,)


def test_an_mp3_with_a_misleading_header_is_still_read_in_place(tmp_path):
    # Written in one piece, libsndfile's Xing header is off, and a seek lands up to a second away.
    path = tmp_path / "a.mp3"
    soundfile.write(path, chirp(3, 16_000), 16_000, format="MP3")
    whole = read_audio(path)
    assert similar(whole, chirp(3, 16_000), 0.02)
    assert torch.equal(read_audio(path, 20_000, 5_000), whole[20_000:25_000])


def test_long_files_are_read_in_blocks_without_seams(tmp_path, monkeypatch):
    for suffix in FORMATS:
        path = write(tmp_path / f"a.{suffix}", np.stack([chirp(3, 16_000)] * 2, axis=1))
        whole = read_audio(path)
        monkeypatch.setattr(audio, "_BLOCK", 5_000)
        assert torch.equal(read_audio(path), whole)
        assert torch.equal(read_audio(path, 7_001, 9_000), whole[7_001:16_001])
        assert measure(path) == (48_000, "")
        monkeypatch.undo()


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_the_two_resamplers_agree(rate):
    wave = torch.randn(rate // 2 + 7, generator=torch.Generator().manual_seed(0))
    fast, direct = resample(wave, rate), audio._resample_directly(wave, rate)
    assert fast.shape == direct.shape == (math.ceil(len(wave) * 16_000 / rate),)
    assert (fast - direct).abs().max() < 2e-4  # torchaudio divides the phases in float32


def test_an_odd_rate_costs_neither_minutes_nor_gigabytes(tmp_path):
    path = write(tmp_path / "a.wav", chirp(3, 44_099), 44_099)
    assert similar(read_audio(path), chirp(3, 16_000), 1e-3)
    assert similar(read_audio(write(tmp_path / "b.wav", chirp(3, 22_254), 22_254)), chirp(3, 16_000), 1e-3)


def test_the_length_is_exact_where_float32_is_not():
    # 4 minutes at 44.1 kHz; without care the length is rounded down, to one sample less
    wave = torch.zeros(441 * 26_215 + 328)  # 119 samples and 1/441
    assert len(resample(wave, 44_100)) == 160 * 26_215 + 120


def test_mixing_down_is_the_mean_of_the_channels(tmp_path):
    wave = np.stack([np.full(800, 0.5), np.zeros(800), np.full(800, -0.2)], axis=1).astype(np.float32)
    assert torch.allclose(read_audio(write(tmp_path / "a.wav", wave, subtype="FLOAT")), torch.full((800,), 0.1))
    for channels in (2, 5):
        wave = np.random.default_rng(0).standard_normal((800, channels)).astype(np.float32)
        mixed = read_audio(write(tmp_path / "a.wav", wave, subtype="FLOAT")).numpy()
        assert np.array_equal(mixed, wave.mean(axis=1))


def broken_files(folder: Path) -> dict[str, str]:
    """File name -> how its defect begins."""
    flac = write(folder / "whole.flac", chirp(2, 16_000)).read_bytes()
    (folder / "whole.flac").unlink()
    (folder / "cut.flac").write_bytes(flac[: len(flac) // 2])
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is not audio\n" * 50)
    (folder / "text.mp3").write_text("this is not audio\n" * 50)
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    write(folder / "header_only.wav", np.zeros(0, np.float32))
    write(folder / "silent.flac", np.zeros(16_000, np.float32))
    write(folder / "slow.wav", chirp(1, 16_000), 10)
    for name, value in (("nan.wav", np.nan), ("inf.wav", np.inf)):
        wave = chirp(1, 16_000)
        wave[500] = value
        write(folder / name, wave, subtype="FLOAT")
    return {
        "cut.flac": "unreadable: ",
        "empty.wav": "empty",
        "text.wav": "unreadable: ",
        "text.mp3": "unreadable: ",
        "folder.wav": "unreadable: not a regular file",
        "pipe.wav": "unreadable: not a regular file",
        "header_only.wav": "empty",
        "silent.flac": "silent",
        "slow.wav": "unreadable: its header says 10 Hz",
        "nan.wav": "not finite",
        "inf.wav": "not finite",
        "gone.wav": "missing",
        "empty.wav/gone.wav": "missing",
    }


def test_defects_are_named(tmp_path):
    for name, defect in broken_files(tmp_path).items():
        got = measure(tmp_path / name)
        assert got.defect.startswith(defect), name
        assert "\n" not in got.defect
        assert str(tmp_path) not in got.defect


def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path):
    broken_files(tmp_path)
    for name in ("cut.flac", "empty.wav", "text.wav", "folder.wav", "pipe.wav", "slow.wav", "gone.wav"):
        with pytest.raises(ArmhubertError) as caught:
            read_audio(tmp_path / name)
        message = str(caught.value)
        assert message.count(str(tmp_path)) == 1
        assert str(tmp_path / name) in message
        assert "\n" not in message


def test_asking_beyond_the_end_is_an_error(tmp_path):
    for rate in (16_000, 8_000):
        path = write(tmp_path / f"{rate}.wav", chirp(1, rate), rate)
        assert len(read_audio(path, 15_000, 1_000)) == 1_000
        with pytest.raises(ArmhubertError, match="ends after 16000 samples at 16 kHz where 16001 were expected"):
            read_audio(path, 15_000, 1_001)


def forget_torchaudio(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("error", ["OSError('no libtorchaudio.so')", "RuntimeError('different CUDA versions')"])
@pytest.mark.parametrize(("torch_version", "remedy"), [("2.12.1+cu130", "==2.11.0"), ("2.13.0", ">=2.11.1")])
def test_a_torchaudio_that_does_not_load_is_one_line(tmp_path, monkeypatch, error, torch_version, remedy):
    forget_torchaudio(monkeypatch)
    (tmp_path / "torchaudio.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "__version__", torch_version)
    with pytest.raises(ArmhubertError, match=f"does not load beside PyTorch {re.escape(torch_version)}: ") as caught:
        resample(torch.zeros(100), 44_100)
    assert f'pip install "torchaudio{remedy}"' in one_line(caught)


def test_a_missing_torchaudio_is_one_line(monkeypatch):
    forget_torchaudio(monkeypatch)
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # as an import finds nothing
    with pytest.raises(ArmhubertError, match="torchaudio must be installed for this: pip install"):
        resample(torch.zeros(100), 44_100)
