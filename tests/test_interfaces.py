"""Students behind the interfaces of torchaudio, s3prl, torch.hub and the Hugging Face hub."""

import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch
from made import torchaudio_model

from armhubert import ARMHuBERT, ArmhubertError, SpeechEncoder
from armhubert.config import preset
from armhubert.convert import torchaudio as from_torchaudio
from armhubert.s3prl import UpstreamExpert, register
from armhubert.torchaudio import TorchaudioEncoder

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def student() -> ARMHuBERT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ARMHuBERT(dataclasses.replace(preset("mini"), layers=4, pattern="CRCR")).eval()


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("student")
    student.save_pretrained(path)
    return path


# torchaudio


@pytest.mark.parametrize("large", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("lengths", [None, [4000, 4000], [4000, 3000]], ids=["none", "full", "padded"])
@torch.no_grad()
def test_features_types_and_lengths_are_torchaudios(large, lengths):
    theirs = torchaudio_model("large" if large else "base", aux=None)
    weights = from_torchaudio.from_model(theirs, "test", normalize=False)
    # torchaudio lets padding into the group norm: compared as it does it
    ours = TorchaudioEncoder(SpeechEncoder.from_weights(weights.with_config(padding="as_trained")))
    waves = torch.randn(2, 4000)
    valid = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    if valid is not None:
        waves[1, lengths[1] :] = 0
    for call in ({}, {"num_layers": 1}, {"num_layers": 2}):
        want, want_lengths = theirs.extract_features(waves, valid, **call)
        got, got_lengths = ours.extract_features(waves, valid, **call)
        assert type(got) is type(want) is list
        assert len(got) == len(want) == call.get("num_layers", 3)
        same(got_lengths, want_lengths)
        for a, b in zip(got, want, strict=True):
            compare(a, b, want_lengths)
    want_last, want_lengths = theirs(waves, valid)
    result = ours(waves, valid)
    assert type(result) is tuple
    same(result[1], want_lengths)
    compare(result[0], want_last, want_lengths)


def same(got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    if want is None:
        assert got is None
    else:
        assert got is not None
        assert got.dtype == want.dtype
        assert got.tolist() == want.tolist()


def compare(got: torch.Tensor, want: torch.Tensor, lengths: torch.Tensor | None) -> None:
    assert got.shape == want.shape
    for i, length in enumerate([want.shape[1]] * len(want) if lengths is None else lengths.tolist()):
        torch.testing.assert_close(got[i, :length], want[i, :length], atol=1e-4, rtol=0)


def test_layers_past_the_last_one_asked_for_do_not_run(student):
    ran = []
    for number, layer in enumerate(student.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    try:
        features, lengths = TorchaudioEncoder(student).extract_features(torch.randn(1, 4000), num_layers=2)
    finally:
        for layer in student.layers:
            layer._forward_hooks.clear()
    assert ran == [1, 2]
    assert len(features) == 2
    assert lengths is None
    for wrong in (0, 5):
        with pytest.raises(ArmhubertError, match=f"num_layers must be at least 1 and at most 4, got {wrong}"):
            TorchaudioEncoder(student).extract_features(torch.randn(1, 4000), num_layers=wrong)
    with pytest.raises(ArmhubertError, match="at least 400 samples"):
        TorchaudioEncoder(student)(torch.randn(1, 300))


def test_all_layers_of_unequal_lengths_are_worked_on_in_groups(student, monkeypatch):
    """As in `model(...)`: padding costs nothing on a CPU."""
    waves, lengths = torch.randn(2, 16000), torch.tensor([16000, 4000])
    adapter, groups = TorchaudioEncoder(student), []
    run = SpeechEncoder._in_groups
    monkeypatch.setattr(SpeechEncoder, "_in_groups", lambda *a: (groups.append(1), run(*a))[1])
    with torch.inference_mode():
        features, frames = adapter.extract_features(waves, lengths)
        again, _ = adapter.extract_features(waves, lengths, num_layers=student.config.layers)
    assert groups == [1]
    for a, b in zip(features, again, strict=True):
        for row, n in enumerate(frames):
            torch.testing.assert_close(a[row, :n], b[row, :n], atol=1e-4, rtol=1e-4)


def test_the_adapter_shares_weights_and_mode(student):
    adapter = TorchaudioEncoder(student)
    assert adapter.training is False
    assert adapter.model.norm.weight.data_ptr() == student.norm.weight.data_ptr()
    want = student(torch.ones(1, 4000))
    got, _ = adapter.extract_features(torch.ones(1, 4000))
    assert all(torch.equal(a, b) for a, b in zip(got, want.hidden_states[1:], strict=True))


# s3prl and torch.hub


def test_the_upstream_keeps_s3prls_documented_interface(student, folder):
    """s3prl/upstream/example/expert.py: a list of waveforms in, a dictionary out, a rate for each of its keys."""
    upstream = UpstreamExpert(ckpt=str(folder), model_config=None, refresh=False)
    waves = [torch.randn(16_000), torch.randn(9000), torch.randn(12_345)]
    with torch.no_grad():
        result = upstream(waves)
        alone = student(waves[1][None])
    hidden = result["hidden_states"]
    assert isinstance(hidden, list)
    assert len(hidden) == 5
    assert {h.shape for h in hidden} == {torch.Size([3, 49, 160])}
    assert torch.equal(result["last_hidden_state"], hidden[-1])
    assert {p.shape for p in result["projections"]} == {torch.Size([3, 49, 256])}
    for key in result:
        assert upstream.get_downsample_rates(key) == 320
    for got, want in zip(hidden, alone.hidden_states, strict=True):
        torch.testing.assert_close(got[1, : want.shape[1]], want[0], atol=1e-5, rtol=0)
    assert "projections" not in UpstreamExpert(ckpt=folder, heads=False)(waves)


def test_what_an_upstream_refuses(folder):
    with pytest.raises(ArmhubertError, match="needs a checkpoint"):
        UpstreamExpert()
    with pytest.raises(ArmhubertError, match=r"model_config must be left out, got 'x\.yaml'"):
        UpstreamExpert(ckpt=folder, model_config="x.yaml")
    upstream, batch = UpstreamExpert(ckpt=folder), torch.randn(2, 4000)
    for wavs in ([], batch, [batch], ["a.wav"]):
        with pytest.raises(ArmhubertError, match=r"wavs must be a list of tensors \[S\], one or more"):
            upstream(wavs)
    with pytest.raises(ArmhubertError, match="400"):
        upstream([batch[0], batch[1, :399]])


def test_registration_with_a_hub_module_like_s3prls(monkeypatch):
    hub = types.ModuleType("s3prl.hub")
    hub.hubert = lambda **_: None  # type: ignore[attr-defined]
    package = types.ModuleType("s3prl")
    package.hub = hub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "s3prl", package)
    monkeypatch.setitem(sys.modules, "s3prl.hub", hub)
    register()
    register()  # twice is no error
    assert hub.armhubert_local is UpstreamExpert  # type: ignore[attr-defined]
    with pytest.raises(ArmhubertError, match="an upstream 'hubert' of its own"):
        register("hubert")
    monkeypatch.setitem(sys.modules, "s3prl", None)
    monkeypatch.setitem(sys.modules, "s3prl.hub", None)
    with pytest.raises(ArmhubertError, match="s3prl cannot be imported"):
        register()


@pytest.fixture
def s3prl(monkeypatch):
    """s3prl itself, where it is installed."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    pytest.importorskip("s3prl", reason="s3prl is not installed (examples/s3prl_shim.py says what it needs)")
    import s3prl_shim  # noqa: F401

    return pytest.importorskip("s3prl.nn", reason="s3prl does not import", exc_type=ImportError)


def test_s3prls_own_featurizers_take_the_upstream(s3prl, student, folder):
    from s3prl.upstream.interfaces import Featurizer

    register()
    upstream = s3prl.S3PRLUpstream("armhubert_local", path_or_url=str(folder)).eval()
    assert (upstream.num_layers, set(upstream.hidden_sizes), set(upstream.downsample_rates)) == (5, {160}, {320})
    waves, lengths = torch.randn(2, 16_000), torch.tensor([16_000, 9000])
    waves[1, 9000:] = 0
    with torch.no_grad():
        layers, frames = upstream(waves, lengths)
        features, _ = s3prl.Featurizer(upstream)(layers, frames)
        want = torch.stack(student(waves, lengths).hidden_states).mean(0)  # its weights begin equal
    assert features.shape == (2, 50, 160)  # s3prl repeats the last frame to fill up
    torch.testing.assert_close(features[0, :49], want[0], atol=1e-5, rtol=0)
    expert = UpstreamExpert(ckpt=folder)
    wavs = [waves[0], waves[1, :9000]]
    for key, width in (("hidden_states", 160), ("projections", 256)):
        old = Featurizer(expert, feature_selection=key, upstream_device="cpu")
        assert (old.output_dim, old.downsample_rate) == (width, 320)
        with torch.no_grad():
            got = old(wavs, expert(wavs))
        assert [g.shape for g in got] == [(49, width), (28, width)]


def test_torch_hub_loads_the_upstream_from_the_repository(folder):
    upstream = torch.hub.load(str(REPOSITORY), "armhubert_local", source="local", ckpt=str(folder))
    assert type(upstream).__name__ == "UpstreamExpert"
    assert len(upstream([torch.randn(4000)])["hidden_states"]) == 5


# the Hugging Face hub


class StubApi:
    """Stands for huggingface_hub.HfApi: keeps what it is given."""

    def __init__(self, token=None) -> None:
        calls.append(("token", token))

    def create_repo(self, repo_id, **settings):
        calls.append(("create", repo_id, settings))
        return types.SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **settings):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        calls.append(("upload", repo_id, settings, files))
        return types.SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


calls: list[tuple] = []


@pytest.fixture
def online(monkeypatch):
    import huggingface_hub.constants

    calls.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", StubApi)
    return StubApi


def test_push_uploads_a_folder_that_loads_again(online, student, tmp_path):
    url = student.push_to_hub("tiny", private=True, token="secret", commit_message="First")
    assert url == "https://huggingface.co/me/tiny/commit/1"
    token, create, (_, repo_id, settings, files) = calls
    assert token == ("token", "secret")
    assert create == ("create", "tiny", {"private": True, "exist_ok": True})
    assert (repo_id, settings["commit_message"], settings["create_pr"]) == ("me/tiny", "First", False)
    assert set(files) == {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    assert 'from_pretrained("me/tiny"' in files["README.md"].decode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    again = ARMHuBERT.from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in student.state_dict().items())
    student.push_to_hub("tiny", card="# Mine\n")
    assert calls[-1][3]["README.md"] == b"# Mine\n"


def test_push_failures_are_one_line(online, student, monkeypatch):
    import huggingface_hub.constants

    def refuse(*_, **__):
        raise OSError("401 Client Error\nInvalid token")

    monkeypatch.setattr(online, "create_repo", refuse)
    with pytest.raises(
        ArmhubertError, match="cannot upload to 'tiny': 401 Client Error Invalid token; check"
    ) as caught:
        student.push_to_hub("tiny")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    calls.clear()
    with pytest.raises(ArmhubertError, match="HF_HUB_OFFLINE is set"):
        student.push_to_hub("tiny")
    assert calls == []


def test_an_impossible_name_is_refused_before_the_network(student, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ArmhubertError, match="cannot upload to 'a/b/c'"):
        student.push_to_hub("a/b/c", token="hf_none")
