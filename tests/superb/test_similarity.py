import json

import pytest
import torch

from armhubert.config import mini
from armhubert.errors import ArmhubertError
from armhubert.student import ARMHuBERT
from armhubert.superb.similarity import Similarity, SimilarityConfig, cka_table, compare, write


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def test_cka_ignores_rotation_scale_and_shift():
    x = random(200, 6)
    rotation = torch.linalg.qr(random(6, 6))[0]
    ((same,),) = cka_table([x], [3 * x @ rotation + 5])
    ((other,),) = cka_table([x], [random(200, 7)])
    assert same == pytest.approx(1)
    assert other < 0.2


def test_cka_by_hand():
    x, y = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]]), torch.tensor([[1.0], [-1.0], [-1.0], [1.0]])
    ((value,),) = cka_table([x], [y])
    assert value == pytest.approx(((1 + 1 - 2 - 2) ** 2) / (10 * 4))
    ((constant,),) = cka_table([x], [torch.ones(4, 1)])
    assert constant == 0


def result_of(config):
    *progress, result = compare(config)
    assert progress[-1].done == progress[-1].total
    assert isinstance(result, Similarity)
    return result


def test_a_model_is_like_itself(waves):
    folder = waves("a.wav", "b.wav", "c.wav", seconds=1)
    result = result_of(SimilarityConfig("mini", "mini", (str(folder),)))
    assert all(result.cka[layer][layer] == pytest.approx(1) for layer in range(7))
    assert all(overlap == pytest.approx(1, abs=1e-4) for overlap in result.maps)
    assert result.mapping == (1, 2, 3, 4, 5, 6)
    (folder / "d.wav").touch()
    (folder / "e.wav").write_text("no audio")
    again = result_of(SimilarityConfig("mini", "mini", (str(folder),)))
    assert (again.utterances, again.skipped) == (3, 2)
    assert all(again.cka[layer][layer] == pytest.approx(1) for layer in range(7))


def test_a_random_student_is_not_like_its_teacher(waves, tmp_path):
    folder = waves("speech/a.wav", "speech/b.wav", "speech/c.wav", seconds=1)
    ARMHuBERT(mini()).save_pretrained(tmp_path / "student")
    config = SimilarityConfig(str(tmp_path / "student"), "mini", (str(folder / "speech"),), str(tmp_path / "out"))
    result = result_of(config)
    assert result.cosine_by == "heads"
    assert max(map(abs, result.cosine)) < 0.5
    assert result.maps[1] is not None
    paths = write(result, config)
    assert json.loads(paths[0].read_text())["mapping"] == list(result.mapping)
    assert paths[1].read_bytes()[:4] == b"\x89PNG"


def test_too_little_speech(waves):
    folder = waves("a.wav")
    with pytest.raises(ArmhubertError, match="at least 2 utterances"):
        list(compare(SimilarityConfig("mini", "mini", (str(folder),))))
