import dataclasses
import json
import sys

import pytest
import torch
from corpora import UPSTREAM

from armhubert.config import mini
from armhubert.errors import ArmhubertError
from armhubert.s3prl import UpstreamExpert
from armhubert.student import ARMHuBERT
from armhubert.superb.upstream import CustomUpstream, load_upstream


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ARMHuBERT(mini()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("source", ["fbank", "fbank_no_cmvn", "mfcc", "mini", "custom", "as trained"])
def test_features_do_not_depend_on_the_batch(source, tmp_path):
    if source == "custom":
        (tmp_path / "own.py").write_text(UPSTREAM)
        source = f"{tmp_path / 'own.py'}:make"
    if source == "as trained":
        source = str(tmp_path / "student")
        ARMHuBERT(dataclasses.replace(mini(), padding="as_trained")).save_pretrained(source)
    upstream = load_upstream(source)
    noise = torch.randn(2, 12_000, generator=torch.Generator().manual_seed(0)) * 0.1
    noise[1, 7_000:] = 0
    both = upstream(noise, torch.tensor([12_000, 7_000]))
    alone = upstream(noise[1:, :7_000], torch.tensor([7_000]))
    frames = int(alone.lengths[0])
    assert frames == upstream.frames(7_000) == int(both.lengths[1])
    assert alone.layers.shape == (upstream.count, 1, frames, upstream.width)
    torch.testing.assert_close(both.layers[:, 1, :frames], alone.layers[:, 0], rtol=1e-4, atol=1e-4)
    assert both.layers[:, 1, frames:].abs().max() == 0


@pytest.mark.parametrize("source", ["fbank", "mfcc", "mini"])
def test_the_shortest_waveform_has_a_frame(source):
    upstream = load_upstream(source)
    states = upstream(torch.ones(1, 5) * 0.1, torch.tensor([5]))
    assert int(states.lengths[0]) == upstream.frames(5) == 1
    assert torch.isfinite(states.layers).all()


def test_fbank_is_kaldis_with_deltas_normalised():
    from torchaudio.compliance import kaldi
    from torchaudio.functional import compute_deltas

    wave = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))
    features = load_upstream("fbank")(wave, torch.tensor([8_000])).layers[0, 0]
    assert features.shape == (48, 240)
    assert features.mean(0).abs().max() < 1e-4
    assert (features.std(0) - 1).abs().max() < 1e-4
    mel = kaldi.fbank(wave, num_mel_bins=80)
    torch.testing.assert_close(load_upstream("fbank_no_cmvn")(wave, torch.tensor([8_000])).layers[0, 0, :, :80], mel)
    delta = compute_deltas(mel.T[None])[0].T
    expected = (delta - delta.mean(0)) / delta.std(0)
    torch.testing.assert_close(features[:, 80:160], expected, rtol=1e-3, atol=1e-3)


def test_a_students_heads_or_hidden_states(student):
    heads, hidden = load_upstream(student), load_upstream(student, features="hidden")
    assert (heads.features, heads.count, heads.width) == ("heads", 6, 256)
    assert (hidden.features, hidden.count, hidden.width) == ("hidden", 7, 160)
    assert heads.identity != hidden.identity
    model = ARMHuBERT.from_pretrained(student)
    wave = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(wave)
    torch.testing.assert_close(heads(wave, torch.tensor([8_000])).layers, torch.stack(expected.projections))
    torch.testing.assert_close(hidden(wave, torch.tensor([8_000])).layers, torch.stack(expected.hidden_states))


def test_the_last_layer_is_what_leaves_the_encoder(tmp_path):
    model = ARMHuBERT(dataclasses.replace(mini(), norm_first=True)).eval()
    model.save_pretrained(tmp_path)
    wave = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(wave)
    for layers in (
        load_upstream(str(tmp_path), features="hidden")(wave, torch.tensor([8_000])).layers,
        UpstreamExpert(tmp_path)([wave[0]])["hidden_states"],
    ):
        torch.testing.assert_close(layers[-1], expected.last_hidden_state)
        torch.testing.assert_close(layers[-2], expected.hidden_states[-2])
    assert not torch.allclose(expected.last_hidden_state, expected.hidden_states[-1])


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
import torch

@dataclass
class Model:
    asked: ClassVar[int] = 0
    hop: int = 400

    def __call__(self, waveforms, lengths):
        Model.asked += 1
        return [waveforms[:, ::400, None].expand(-1, -1, 3)], -(-lengths // 400)

def make():
    return Model()
"""


def test_a_file_with_dataclasses_is_asked_for_features_alone(tmp_path):
    (tmp_path / "json.py").write_text(OWN)
    upstream = load_upstream(f"{tmp_path / 'json.py'}:make")
    assert isinstance(upstream, CustomUpstream)
    assert [upstream.frames(samples) for samples in (400, 401, 16_000)] == [1, 2, 40]
    assert upstream.function.asked == 1  # when it was loaded
    assert sys.modules["json"] is json
    (tmp_path / "json.py").write_text("1 / 0")
    before = set(sys.modules)
    with pytest.raises(ArmhubertError, match="ZeroDivisionError"):
        load_upstream(f"{tmp_path / 'json.py'}:make")
    assert set(sys.modules) <= before


def test_what_cannot_be_an_upstream(tmp_path):
    with pytest.raises(ArmhubertError, match="need a student with heads"):
        load_upstream("mini", features="heads")
    with pytest.raises(ArmhubertError, match="cannot be imported"):
        load_upstream("no_such_module_at_all:make")
    own = tmp_path / "own.py"
    own.write_text("def number():\n    return 3\n\ndef bad():\n    return lambda waveforms, lengths: (1, 2)\n")
    with pytest.raises(ArmhubertError, match="must return a callable"):
        load_upstream(f"{own}:number")
    with pytest.raises(ArmhubertError, match=r"must return \(L tensors"):
        load_upstream(f"{own}:bad")
