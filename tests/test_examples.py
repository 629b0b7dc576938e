"""The scripts in examples/, as a user runs them."""

import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchaudio

from armhubert import ARMHuBERT
from armhubert.bundled import TRAINING_SPEECH
from armhubert.config import preset

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ARMHuBERT(dataclasses.replace(preset("mini"), layers=4, pattern="CRCR")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hubert(tmp_path_factory) -> Path:
    """A HuBERT of the student's size, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hubert")
    config = transformers.HubertConfig(
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=288,
        conv_dim=(32,) * 7,
        layerdrop=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.HubertModel(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_one_training_script_serves_hubert_and_the_student(hubert, student):
    """The swap: a minute of real speech, the same script, another folder."""
    for model in (hubert, student):
        printed = run("transformers_ctc.py", model, TRAINING_SPEECH, "--seconds", 60, "--passes", 3)
        losses = [float(loss) for loss in re.findall(r"pass \d+: loss ([\d.]+)", printed)]
        assert len(losses) == 3
        assert losses[-1] < 0.6 * losses[0], (model, losses)


@pytest.mark.parametrize("before", [True, False], ids=["HUBERT_BASE", "student"])
def test_the_torchaudio_script_saves_features_of_either(before, student, tmp_path, monkeypatch, capsys):
    small = torchaudio.models.wav2vec2_model(
        "group_norm", [(32, 10, 5), *[(32, 3, 2)] * 4, *[(32, 2, 2)] * 2], False, 160, 0.0, 16, 4, 4, 4, 0.0, 64, 0.0,
        0.0, False, 0.0, None,
    ).eval()  # fmt: skip
    monkeypatch.setattr(type(torchaudio.pipelines.HUBERT_BASE), "get_model", lambda _: small)  # in place of a download
    model = "HUBERT_BASE" if before else str(student)
    speech = TRAINING_SPEECH / "1867"
    monkeypatch.setattr(sys, "argv", ["x", model, str(speech), str(tmp_path), "--layer", "2"])
    runpy.run_path(str(EXAMPLES / "torchaudio_features.py"), run_name="__main__")
    saved, printed = sorted(tmp_path.glob("*.pt")), capsys.readouterr().out
    assert [path.stem for path in saved] == sorted(path.stem for path in speech.rglob("*.opus"))
    for path in saved:
        features = torch.load(path, weights_only=True)
        assert features.shape[1] == 160
        assert f"{path.stem}: {list(features.shape)}" in printed


def test_the_s3prl_recipe_trains_on_a_student(student, tmp_path):
    pytest.importorskip("s3prl", reason="s3prl is not installed (examples/s3prl_shim.py says what it needs)")
    run("s3prl_speakers.py", student, TRAINING_SPEECH, tmp_path, "--steps", 4)
    result = (tmp_path / "evaluate/valid_best/test/result.yaml").read_text()
    assert 0 < float(re.findall(r"loss: ([\d.]+)", result)[0]) < 4  # chance for 14 speakers: 2.64
