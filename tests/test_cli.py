import contextlib
import dataclasses
import errno
import json
import os
import re
import resource
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import soundfile
import torch
import typer
from made import SHAPE, digests, write_speech, write_teacher
from rich.text import Text

from armhubert import cli, data, distill
from armhubert.cli import ui
from armhubert.cli.app import app
from armhubert.cli.options import as_typed
from armhubert.cli.signals import stop_on_signal
from armhubert.distill_config import DistillConfig
from armhubert.export import ExportConfig
from armhubert.extract import ExtractConfig
from armhubert.profile import ProfileConfig
from armhubert.superb.config import EvaluateConfig

STUDENT = [
    "--width", "32", "--layers", "2", "--heads", "2", "--ffn", "32", "--conv-layers", SHAPE["conv_layers"],
    "--batch-seconds", "4", "--steps", "4", "--workers", "0", "--device", "cpu", "--hold-out", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    return write_speech(tmp_path_factory.mktemp("data") / "speech", (0.8, 0.6, 0.7))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def refused(call):
    """Run and expect bad input: exit code 2, one line that says why, nothing printed as if it had worked."""

    def run(*argv: object, says: str) -> str:
        code, out, err = call(*argv)
        assert code == 2, (out, err)
        assert err.endswith("\n")
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: "), err
        assert re.search(says, err), err
        assert "finished" not in out
        return err

    return run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, speech, teacher):
    """A run of four steps, to be copied."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    config = DistillConfig(
        out=str(folder), data=(str(speech),), teacher=str(teacher), **SHAPE, batch_seconds=4.0, steps=4, workers=0,
        device="cpu", hold_out=0.0, log_every=1, save_every=100,
    )  # fmt: skip
    list(distill.distill(config))
    return folder


@pytest.fixture
def old_run(finished_run, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(finished_run, folder)
    return folder


@pytest.fixture
def handed_over(monkeypatch):
    """The configuration that the command line hands to the library, in place of a run."""
    seen = []

    def fake(config, **how):
        seen.append((config, how))
        yield distill.Finished(1, "done", 0.5, 1.0, 1.0, 1, Path(config.out))

    monkeypatch.setattr(distill, "distill", fake)
    return seen


# what is understood


@pytest.mark.parametrize("asked", [["--help"], ["-h"], ["distill", "--help"], ["info", "--help"]])
def test_help(call, asked):
    code, out, err = call(*asked)
    assert (code, err) == (0, "")
    assert "Usage" in out
    if asked[0] == "distill":
        for field in DistillConfig.__dataclass_fields__:
            if field != "data":
                assert f"--{field.replace('_', '-')}" in re.sub(r"[│\s]+", " ", out), field


def test_version(call):
    from armhubert import __version__

    assert call("--version") == (0, f"armhubert {__version__}\n", "")


def commands():
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_no_help_is_taken_for_markup_and_lost():
    texts = [text for c in commands().values() for text in (c.help, *(getattr(p, "help", None) for p in c.params))]
    assert len(texts) > 100
    assert [text for text in texts if text and Text.from_markup(text).plain != text] == []


def test_the_defaults_that_the_help_tells_are_those_of_the_configurations():
    for command, config, least in (("distill", DistillConfig(), 20), ("evaluate", EvaluateConfig(data="."), 4)):
        compared = 0
        for parameter in commands()[command].params:
            told, value = parameter.show_default, getattr(config, parameter.name, None)
            if isinstance(told, str) and value not in (None, ()) and parameter.name not in ("out", "model"):
                compared += 1
                shown = ("no", "yes")[value] if isinstance(value, bool) else str(value)
                assert float(told) == value if isinstance(value, float) else told == shown, parameter.name
        assert compared >= least


@pytest.mark.parametrize(
    ("command", "settings", "least"),
    [("extract", ExtractConfig, 9), ("export", ExportConfig, 5), ("profile", ProfileConfig, 9)],
)
def test_the_defaults_of_options_are_those_of_the_configurations(command, settings, least):
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    compared = 0
    for parameter in commands()[command].params:
        if parameter.default is not None and parameter.name in defaults:
            value = defaults[parameter.name]
            listed = ",".join(f"{item:g}" for item in value) if isinstance(value, tuple) else value
            assert parameter.default == listed, parameter.name
            compared += 1
    assert compared >= least


def test_without_a_command_the_help_is_shown(call):
    code, out, err = call()
    assert code in (0, 2)
    assert "distill" in out + err


def test_no_options_are_the_published_defaults(call, handed_over):
    assert call("distill")[0] == 0
    ((config, how),) = handed_over
    assert config == DistillConfig()
    assert (how["resume"], how["force"], how["should_stop"]()) == (False, False, False)


def test_every_option_reaches_the_configuration(call, handed_over):
    code, _, err = call(
        "distill", "a", "b", "-o", "run", "--force", "--valid", "v1", "--valid", "v2", "--teacher", "HUBERT_BASE",
        "--preset", "maskhubert", "--width", 96, "--layers", 4, "--heads", 3, "--ffn", 64, "--pattern", "CRRC",
        "--conv-layers", "[(96, 10, 5)]", "--attention-mode", "resoftmax", "--dropout", 0.3, "--init", "teacher",
        "--loss", "star=2", "--distance", "l1", "--layer-weight", 0.5, "--mask-prob", 0.4, "--mask-prob-end", 0.9,
        "--mask-length", 7, "--epochs", 1.5, "--batch-seconds", 12, "--accumulate", 3, "--max-seconds", 8,
        "--lr", "1e-4", "--warmup", 0.2, "--weight-decay", 0, "--clip", 2, "--precision", "bf16",
        "--beta1", 0.8, "--beta2", 0.95, "--epsilon", "1e-8",
        "--gradient-checkpointing", "--impl", "torch", "--device", "cpu", "--workers", 0, "--seed", 9,
        "--log-every", 2, "--validate-every", 3, "--save-every", 4, "--patience", 5,
    )  # fmt: skip
    assert (code, err) == (0, "")
    ((config, how),) = handed_over
    assert config == DistillConfig(
        out="run", data=("a", "b"), valid=("v1", "v2"), teacher="HUBERT_BASE", preset="maskhubert",
        width=96, layers=4, heads=3, ffn=64, pattern="CRRC", conv_layers="[(96, 10, 5)]", attention_mode="resoftmax",
        dropout=0.3, init="teacher", loss="star=2", distance="l1", layer_weight=0.5, mask_prob=0.4, mask_prob_end=0.9,
        mask_length=7, epochs=1.5, batch_seconds=12.0, accumulate=3, max_seconds=8.0, learning_rate=1e-4, warmup=0.2,
        weight_decay=0.0, clip=2.0, precision="bf16", gradient_checkpointing=True, impl="torch", device="cpu",
        beta1=0.8, beta2=0.95, epsilon=1e-8, workers=0, seed=9, log_every=2, validate_every=3, save_every=4, patience=5,
    )  # fmt: skip
    assert how["force"] is True
    assert call("distill", "--hold-out", 0.25)[0] == 0
    assert handed_over[-1][0] == DistillConfig(hold_out=0.25)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_options_given_win_over_the_file_and_the_file_over_the_defaults(call, handed_over, tmp_path, suffix):
    file = tmp_path / f"settings.{suffix}"
    text = {
        "yaml": "data: [speech]\nepochs: 3\nlearning_rate: 1e-4\nseed: 5\ngradient_checkpointing: true\nclip: null\n",
        "json": '{"data": ["speech"], "epochs": 3, "learning_rate": 1e-4, "seed": 5, "gradient_checkpointing": true}',
    }[suffix]
    file.write_text(text)
    assert call("distill", "--config", file, "--seed", 6, "--steps", 7, "--no-gradient-checkpointing")[0] == 0
    assert call("distill", "--config", file)[0] == 0
    assert [config for config, _ in handed_over] == [
        DistillConfig(data=("speech",), steps=7, learning_rate=1e-4, seed=6),
        DistillConfig(data=("speech",), epochs=3.0, learning_rate=1e-4, seed=5, gradient_checkpointing=True),
    ]


@pytest.mark.parametrize(("held", "given"), [("steps", "epochs"), ("epochs", "steps"), ("steps", "steps")])
def test_the_length_of_a_run_on_the_command_line_replaces_the_one_in_the_file(
    call, refused, handed_over, tmp_path, held, given
):
    (tmp_path / "run.yaml").write_text(f"{held}: 3\n")
    assert call("distill", "--config", tmp_path / "run.yaml", f"--{given}", 7)[0] == 0
    assert [config for config, _ in handed_over] == [DistillConfig(**{given: 7})]
    refused("distill", "--config", tmp_path / "run.yaml", "--steps", 1, "--epochs", 2, says="steps or epochs, not both")


def test_resume_takes_the_runs_own_settings_and_the_changes_allowed(call, handed_over, old_run):
    code, _, err = call("distill", "--resume", old_run, "--steps", 9, "--log-every", 3, "--seed", 0)
    assert (code, err) == (0, "")
    ((config, how),) = handed_over
    assert how["resume"] is True
    assert (config.out, config.steps, config.log_every, config.width) == (str(old_run), 9, 3, 32)


# what is printed


def test_output_without_a_terminal_is_one_parseable_line_a_report(call, speech, teacher, tmp_path):
    out = tmp_path / "with space"
    code, text, err = call(
        "distill", speech, "-o", out, "--teacher", teacher, *STUDENT, "--hold-out", 0.3, "--log-every", 2,
        "--validate-every", 4,
    )  # fmt: skip
    assert (code, err) == (0, "")
    kinds = []
    for line in text.splitlines():
        kind, *pairs = shlex.split(line)
        values = dict(pair.split("=", 1) for pair in pairs)
        kinds.append(kind)
        if kind == "train":
            assert float(values["loss"]) > 0
            assert values["of"] == "4"
        elif kind in ("start", "finished"):
            assert values["out"] == str(out)
        elif kind == "saved":
            assert Path(values["path"]).is_file()
        elif kind == "valid":
            assert len(values["layers"].split(",")) == 2
    assert kinds == ["scan", "start", "train", "train", "valid", "saved", "finished"]
    assert "\x1b" not in text


def test_output_on_a_terminal_shows_the_run_and_where_the_student_is(call, speech, teacher, tmp_path, monkeypatch):
    import io

    screen = io.StringIO()
    monkeypatch.setattr(cli.ui, "out", cli.ui.console(file=screen, force_terminal=True, width=200, soft_wrap=True))
    out = tmp_path / "run [b]"
    (tmp_path / "more[b]").mkdir()
    soundfile.write(tmp_path / "more[b]" / "short.wav", torch.ones(50).numpy() * 0.1, 16_000)
    (tmp_path / "teacher[i]").symlink_to(teacher)
    teacher = tmp_path / "teacher[i]"
    code, _, err = call(
        "distill", speech, tmp_path / "more[b]", "-o", out, "--teacher", teacher, *STUDENT, "--steps", 2,
        "--hold-out", 0.3,
    )  # fmt: skip
    assert (code, err) == (0, "")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "Done at step 2" in text
    assert "held-out loss" in text
    assert f"{teacher}, " in text
    assert f"too short, listed in {out / 'skipped.tsv'}" in text
    assert f"ARMHuBERT.from_pretrained({str(out)!r})" in text


def test_info_tells_what_a_run_made_and_runs_it(call, old_run, speech):
    code, out, err = call("info", old_run, "--audio", speech / "0.wav")
    assert (code, err) == (0, "")
    assert "2 of width 32, 2 heads, FFN 32" in out
    assert "CR" in out
    assert "features [1, 39, 32]" in out


def test_names_that_look_like_markup_are_shown_as_they_are(call, old_run, speech, tmp_path):
    model, audio = tmp_path / "run[b]", tmp_path / "x[b].wav"
    model.symlink_to(old_run)
    audio.write_bytes((speech / "0.wav").read_bytes())
    code, out, err = call("info", model, "--audio", audio)
    assert (code, err) == (0, "")
    assert re.search(r"model +.*run\[b\]", out)
    assert "x[b].wav: 0.80 s" in out
    assert "x[/b].wav" in call("info", model, "--audio", tmp_path / "x[/b].wav")[2]


def test_info_shows_the_whole_name_of_a_model(call, old_run, tmp_path):
    model = tmp_path / ("m" * 150)
    model.symlink_to(old_run)
    code, out, err = call("info", model)
    assert (code, err) == (0, "")
    assert str(model) in out


def test_info_on_what_is_no_model(refused, tmp_path):
    refused("info", tmp_path, says="no config.json")
    refused("info", tmp_path / "absent", says="no model at")


def test_info_on_a_recording_that_memory_does_not_hold(refused, old_run, speech, monkeypatch):
    monkeypatch.setattr("armhubert.audio.read_audio", lambda path: torch.empty(2**60, dtype=torch.uint8))
    refused("info", old_run, "--audio", speech / "0.wav", says=r"must hold all of .*0\.wav: name a shorter recording")


def test_info_on_a_recording_that_is_too_short_names_it(refused, old_run, tmp_path):
    soundfile.write(tmp_path / "short.wav", torch.ones(50).numpy() * 0.1, 16_000)
    refused(
        "info", old_run, "--audio", tmp_path / "short.wav", says=r"short\.wav must have at least \d+ samples.*got 50"
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_exits_with_the_codes_of_signals(call, monkeypatch, number, code):
    def stopped(config, *, should_stop, **how):
        assert not should_stop()
        signal.raise_signal(number)
        reason = "stopped" if should_stop() else "done"
        yield distill.Finished(1, reason, 0.5, 1.0, 1.0, 1, Path(config.out))

    monkeypatch.setattr(distill, "distill", stopped)
    assert call("distill")[0] == code


@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background job"])
def test_a_request_to_stop_may_come_as_several_signals(monkeypatch, capsys, inherited):
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, inherited))
        stop = stack.enter_context(stop_on_signal())
        for number in (
            signal.SIGTERM,
            signal.SIGTERM,
            signal.SIGINT,
        ):  # from a scheduler, from torchrun, from a terminal
            signal.raise_signal(number)
        assert stop.asked()
        assert stop.number == signal.SIGTERM
        monkeypatch.setattr("armhubert.cli.signals.SAME_REQUEST", 0.0)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capsys.readouterr().err.count("Stopping as soon as") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_while_the_audio_is_examined_ends_the_run_before_its_first_step(
    call, speech, teacher, tmp_path, monkeypatch, terminal
):
    measure, signals = data.measure, iter([signal.SIGINT])

    def interrupted(path):
        for number in signals:
            signal.raise_signal(number)
        return measure(path)

    argv = ["distill", speech, "-o", tmp_path / "run", "--teacher", teacher, *STUDENT]
    with monkeypatch.context() as patch:
        patch.setattr(data, "measure", interrupted)
        patch.setattr(data, "_CHUNK", len(os.listdir(speech)))
        patch.setattr(cli.ui, "out", cli.ui.console(force_terminal=terminal, width=100, soft_wrap=True))
        code, out, err = call(*argv)
    assert code == 130
    assert "Stopping as soon as" in err
    assert "Stopped before the first step; the same command starts anew" in err
    assert terminal or "finished reason=not-begun step=0 train_seconds=" in out
    assert "--resume" not in out
    assert os.listdir(tmp_path / "run") == [".armhubert-scan.json"]
    assert call(*argv)[0] == 0


def test_an_interrupt_before_training_exits_with_130(call, monkeypatch):
    def interrupted(config, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "distill", interrupted)
    assert call("distill")[0] == 130


def test_a_defect_of_ours_keeps_its_traceback(call, monkeypatch):
    def defect(config, **how):
        raise ZeroDivisionError

    monkeypatch.setattr(distill, "distill", defect)
    with pytest.raises(ZeroDivisionError):
        call("distill")


# bad input: data


@pytest.fixture
def rejected(refused, speech, teacher, tmp_path):
    """Run with a fault: refused, nothing in OUT but what was examined, and the data and the teacher as they were."""

    def run(*argv: object, says: str, data: object = speech, teacher: object = teacher) -> str:
        out = tmp_path / "run"
        before = digests(speech), os.listdir(tmp_path)
        err = refused("distill", data, "-o", out, "--teacher", teacher, *STUDENT, *argv, says=says)
        assert not out.exists() or set(os.listdir(out)) <= {".armhubert-scan.json"}
        assert digests(speech) == before[0]
        assert set(os.listdir(tmp_path)) - set(before[1]) <= {"run"}
        return err

    return run


def test_a_missing_data_folder(rejected, tmp_path):
    rejected(data=tmp_path / "absent", says="absent' does not exist")


def test_an_empty_data_folder(rejected, tmp_path):
    (tmp_path / "empty").mkdir()
    rejected(data=tmp_path / "empty", says="holds no audio")
    assert not any((tmp_path / "empty").iterdir())


def test_data_in_which_nothing_is_usable(rejected, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "broken.wav").write_bytes(b"RIFF nothing")
    (folder / "empty.flac").touch()
    soundfile.write(folder / "silent.wav", torch.zeros(16_000).numpy(), 16_000)
    soundfile.write(folder / "short.wav", torch.ones(50).numpy() * 0.1, 16_000)
    before = digests(folder)
    rejected(
        data=folder,
        says=r"data must hold usable audio, got 4 files of which none can be used \(.*, first '.*broken.wav'\)",
    )
    assert digests(folder) == before


def test_missing_validation_speech(rejected, tmp_path):
    rejected("--valid", tmp_path / "absent", says="does not exist")


def test_validation_speech_of_which_nothing_is_usable_is_named_as_such(rejected, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    rejected("--valid", tmp_path / "broken.wav", says="error: --valid must hold usable audio, got 1 files")


def test_validation_speech_and_a_share_to_hold_out(rejected, speech):
    rejected("--valid", speech, "--hold-out", "0.1", says="--valid .* --hold-out .* give one of them")


# bad input: teachers


def test_a_teacher_folder_without_configuration(rejected, tmp_path):
    (tmp_path / "none").mkdir()
    rejected(teacher=tmp_path / "none", says=r"no config\.json")


def test_a_teacher_folder_without_weights(rejected, tmp_path, teacher):
    (tmp_path / "none").mkdir()
    shutil.copy(teacher / "config.json", tmp_path / "none")
    rejected(teacher=tmp_path / "none", says="has no weights")


@pytest.mark.parametrize("keep", [0, 4, 500, -100])
def test_a_teacher_with_truncated_weights(rejected, tmp_path, teacher, keep):
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    (broken / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:keep])
    rejected(teacher=broken, says=r"model\.safetensors is damaged")


def test_a_teacher_with_weights_of_the_wrong_shape_or_number(rejected, tmp_path, teacher):
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    good = safetensors.torch.load_file(teacher / "model.safetensors")
    name = "encoder.layers.1.feed_forward.output_dense.weight"
    for state, says in (
        ({**good, name: torch.zeros(32, 47)}, r"shape \[32, 48\] by its configuration, got \[32, 47\]"),
        ({k: v for k, v in good.items() if k != name}, "lacks"),
        ({k: v for k, v in good.items() if "k_proj" not in k}, "lacks"),
        ({**good, "encoder.layers.2.final_layer_norm.bias": torch.zeros(32)}, "too many"),
    ):
        safetensors.torch.save_file(state, broken / "model.safetensors")
        rejected(teacher=broken, says=says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "bert"}, "'bert' model; supported: hubert"),
        ({"model_type": None}, "supported: hubert"),
        ({"hidden_act": "relu"}, "only 'gelu'"),
        ({"hidden_size": "wide"}, "whole number"),
        ({"num_attention_heads": 5}, "divisible by heads"),
    ],
)
def test_a_teacher_of_an_unsupported_kind(rejected, tmp_path, teacher, change, says):
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    config = {**json.loads((teacher / "config.json").read_text()), **change}
    (broken / "config.json").write_text(json.dumps(config))
    rejected(teacher=broken, says=says)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"model_type": "hubert"'])
def test_a_teacher_with_a_damaged_configuration(rejected, tmp_path, teacher, text):
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    (broken / "config.json").write_text(text)
    rejected(teacher=broken, says=r"config\.json (is not valid JSON|must hold a mapping)")


def test_a_teacher_that_is_nowhere(rejected):
    rejected(teacher="HUBBERT_BASE", says="no model at 'HUBBERT_BASE'")


# bad input: settings


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--pattern", "RC"], "first layer must compute"),
        (["--pattern", "CRC"], "2 layers, got 3"),
        (["--pattern", "2by6"], "2 layers, got 12"),
        (["--pattern", "CX"], "made of C"),
        (["--pattern", "0by2"], "N of at least 1"),
        (["--heads", "5"], "width must be divisible by heads, got width 32 and heads 5"),
        (["--width", "24"], "divisible by position_groups"),
        (["--width", "0"], "width must be above 0"),
        (["--preset", "armhubrt"], "unknown preset 'armhubrt'; did you mean 'armhubert'"),
        (["--conv-layers", "__import__('os')"], "must read like"),
        (["--conv-layers", "[(8, 10, 5)] * 0"], "at least one"),
        (["--conv-layers", "[(32, 10, 5)]"], "same frames"),
        (["--loss", "maskin"], "unknown loss term 'maskin'.*did you mean 'masking'"),
        (["--loss", "masking=-1"], "positive weights"),
        (["--attention-mode", "fast"], "'exact' or 'resoftmax', got 'fast'"),
        (["--precision", "fp8"], "got 'fp8'"),
        (["--impl", "cuda"], "got 'cuda'"),
        (["--init", "zero"], "got 'zero'"),
        (["--epochs", "2"], "steps or epochs, not both"),
        (["--lr", "nan"], "--lr must be a number, got nan"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--seed", "9223372036854775808"], "seed must be below"),
        (["--max-seconds", "0.01"], "--max-seconds must be at least"),
        (["--batch-seconds", "1e-9"], "--batch-seconds must be at least"),
        (["--hold-out", "1"], "--hold-out must be"),
        (["--device", "tpu"], "device must be auto, cpu, cuda"),
        (["--device", "cuda:x"], "device must be auto, cpu, cuda"),
    ],
)  # fmt: skip
def test_settings_that_break_a_rule(rejected, argv, says):
    rejected(*argv, says=says)


def test_messages_name_what_was_typed(refused, tmp_path):
    (tmp_path / "batch_seconds.yaml").write_text("batch_seconds: 0\n")
    file = tmp_path / "batch_seconds.yaml"
    refused("distill", "--config", file, says=r"error: batch_seconds must be above 0, got 0")
    refused("distill", "--config", file, "--batch-seconds", 0, says="error: --batch-seconds must be above 0, got 0")
    file.write_text("batch_second: 0\n")
    says = r"unknown key 'batch_second' in .*/batch_seconds\.yaml and the options; did you mean 'batch_seconds'"
    refused("distill", "--config", file, "--batch-seconds", 4, says=says)


@pytest.mark.parametrize(
    ("typed", "message", "shown"),
    [
        ("distill", "continue it with resume=True, or force=True", "continue it with --resume FOLDER, or --force"),
        ("profile mini", "not there: use memory=False", "not there: use --no-memory"),
        ("export mini m.pt2", "use format='torch' or format='aot'", "use --format torch or --format aot"),
        ("extract mini", "lower batch_seconds=60; what is", "lower --batch-seconds 60; what is"),
        ("extract mini", "lower batch_seconds=2.5", "lower --batch-seconds 2.5"),
        ("profile mini", "raise limit_seconds=...", "raise --limit"),
        ("evaluate", "by train=..., dev=... or test=...", "by --train, --dev or --test"),
        ("evaluate --lr=1", "sweep='lr' chooses: leave out learning_rate=...", "--sweep lr chooses: leave out --lr"),
        ("evaluate", "rates must be above 0", "rates must be above 0"),
        ("distill", "name data=... anew", "name data=... anew"),
        ("info mini", "start anew with force=True", "start anew with force=True"),
        ("distill", "attend(impl='triton') or /a/seed=3", "attend(impl='triton') or /a/seed=3"),
        ("", "start anew with force=True", "start anew with force=True"),
    ],
)
def test_settings_in_messages_are_options_of_the_command(typed, message, shown):
    assert as_typed(message, typed.split()) == shown


def test_remarks_name_options_too(monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["armhubert", "profile", "mini"])
    ui.note("whose cost this profile leaves out: add heads=True for it")
    assert capfd.readouterr().err == "whose cost this profile leaves out: add --heads for it\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_asked_for_and_absent(rejected, device):
    rejected("--device", device, says="sees no GPU here: use --device cpu or --device auto")


def test_a_gpu_asked_for_beyond_those_there_are(rejected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rejected("--device", "cuda:3", says="'cuda:3' was asked for and there are 1 GPUs")


@pytest.mark.parametrize(
    "argv", [["--stepz", "3"], ["--steps", "abc"], ["--steps"], ["--lr", "fast"]]
)  # fmt: skip
def test_options_that_the_parser_does_not_know_or_cannot_read(call, tmp_path, argv):
    code, _, err = call("distill", "-o", tmp_path / "run", *argv)
    assert code == 2
    assert "Traceback" not in err
    assert argv[0] in err
    assert not (tmp_path / "run").exists()


def test_an_unknown_command(call):
    code, _, err = call("destill")
    assert code == 2
    assert "destill" in err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'.*did you mean 'learning_rate'"),
        ("qqq: 1", "unknown key 'qqq'.*known:"),
        ("1: 2", "unknown key 1"),
        ("out: !!python/object/apply:os.system ['touch PWNED']", "not valid YAML"),
        ("!!python/object/new:os.system ['touch PWNED']", "not valid YAML"),
        ("- a\n- b", "must hold a mapping of settings, got list"),
        ("just text", "must hold a mapping of settings, got str"),
        ("", "must hold a mapping of settings, got NoneType"),
        ("a: [1", "not valid YAML"),
        ("seed: &a [*a]", "aliases .* are not read"),
        ("? [a, b]\n: 1", "not valid YAML|unknown key"),
        ("? {a: b}\n: 1", "not valid YAML"),
        ("steps: 1.5", "steps in .* must be a whole number, got 1.5"),
        ("steps: true", "must be a whole number"),
        ("data: 5", "must be a list"),
        ("learning_rate: .inf", "must be a number"),
        ("out: 3", "must be text"),
        ("gradient_checkpointing: 1", "must be true or false"),
        ("[" * 3000, "not valid YAML"),
        ("\x07", "not valid YAML"),
    ],
)
def test_a_configuration_file_that_is_wrong_or_hostile(refused, tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    refused("distill", "--config", "bad.yaml", says=says)
    assert os.listdir(tmp_path) == ["bad.yaml"]


def test_a_configuration_file_that_cannot_be_read(refused, tmp_path):
    refused("distill", "--config", tmp_path / "absent.yaml", says="cannot read .*absent.yaml")
    refused("distill", "--config", tmp_path, says="cannot read")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(128, 256)))
    refused("distill", "--config", tmp_path / "binary.yaml", says="not valid YAML")


# bad input: OUT


def test_out_that_exists_and_is_no_run_is_kept_without_force(call, refused, speech, teacher, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    refused("distill", speech, "-o", out, "--teacher", teacher, *STUDENT, says="not empty and is no run")
    assert os.listdir(out) == ["chapter.txt"]
    code, _, err = call("distill", speech, "-o", out, "--teacher", teacher, *STUDENT, "--steps", 1, "--force")
    assert (code, err) == (0, "")
    assert (out / "chapter.txt").read_text() == "years of work"
    assert (out / "checkpoint.pt").is_file()


def test_out_that_is_an_empty_folder_is_used(call, speech, teacher, tmp_path):
    (tmp_path / "run").mkdir()
    assert call("distill", speech, "-o", tmp_path / "run", "--teacher", teacher, *STUDENT, "--steps", 1)[0] == 0


def test_out_that_is_a_run_is_kept_without_force_or_resume(refused, speech, teacher, old_run):
    before = digests(old_run)
    refused(
        "distill", speech, "-o", old_run, "--teacher", teacher, *STUDENT, says="with --resume FOLDER, .* with --force"
    )
    assert digests(old_run) == before


def test_out_that_is_a_file_or_below_one(refused, speech, teacher, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out, says in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "run", "cannot write")):
        refused("distill", speech, "-o", out, "--teacher", teacher, *STUDENT, says=says)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("inside", [".", "run", "deep/run"])
def test_out_inside_the_data_is_refused_even_by_force(refused, teacher, tmp_path, inside):
    data = write_speech(tmp_path / "speech", (0.5, 0.5))
    (tmp_path / "link").symlink_to(data)
    before = digests(data)
    for out in (data / inside, tmp_path / "link" / inside):
        refused("distill", data, "-o", out, "--teacher", teacher, *STUDENT, "--force", says="lies inside the data")
    assert digests(data) == before
    assert not (data / "run").exists()


# bad input: resume


def test_resume_of_what_is_no_run(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("distill", "--resume", tmp_path / "empty", says=r"is no run: it has no distill\.json")
    refused("distill", "--resume", tmp_path / "absent", says="is no run")
    assert not any((tmp_path / "empty").iterdir())
    assert not (tmp_path / "absent").exists()


def test_resume_without_a_checkpoint(refused, old_run, speech):
    (old_run / "checkpoint.pt").unlink()
    before = digests(old_run)
    refused("distill", "--resume", old_run, says=r"no checkpoint\.pt: nothing to resume")
    refused("distill", speech, "-o", old_run, says="ended before its first checkpoint: start anew with --force")
    assert digests(old_run) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--width", "64"], "keeps its width 32, got 64"),
        (["--pattern", "CC"], "keeps its pattern"),
        (["--loss", "plain"], "keeps its loss"),
        (["--seed", "3"], "keeps its seed"),
        (["--force"], "give one of them"),
        (["-o", "elsewhere"], "leave it out"),
        (["--steps", "5", "--epochs", "2"], "not both"),
    ],
)
def test_resume_with_changes_to_what_the_run_computes(refused, old_run, argv, says):
    before = digests(old_run)
    refused("distill", "--resume", old_run, *argv, says=says)
    assert digests(old_run) == before


def edit(folder: Path, **changes) -> None:
    settings = json.loads((folder / "distill.json").read_text())
    (folder / "distill.json").write_text(json.dumps({**settings, **changes}))


def test_resume_notices_another_teacher_under_the_same_name(refused, old_run, tmp_path, teacher):
    other = tmp_path / "teacher"
    shutil.copytree(teacher, other)
    write_teacher(other, seed=1)
    edit(old_run, teacher=str(other))
    before = digests(old_run)
    refused("distill", "--resume", old_run, says="made with another teacher")
    assert digests(old_run) == before


def test_resume_notices_another_student_shape(refused, old_run):
    edit(old_run, ffn=48)
    before = digests(old_run)
    refused("distill", "--resume", old_run, says=r"made with another student \(ffn\)")
    assert digests(old_run) == before


def test_resume_notices_another_batch_in_a_step(refused, old_run):
    edit(old_run, accumulate=2)
    refused("distill", "--resume", old_run, says="batches in a step: 1 then, 2 now")


def test_resume_notices_changed_data(refused, old_run, tmp_path, speech):
    data = tmp_path / "speech"
    shutil.copytree(speech, data)
    soundfile.write(data / "more.wav", 0.1 * torch.randn(9000).numpy(), 16_000)
    before = digests(old_run)
    refused("distill", data, "--resume", old_run, says="made with other data")
    assert {**digests(old_run), ".armhubert-scan.json": before[".armhubert-scan.json"]} == before


@pytest.mark.parametrize("damage", ["empty", "text", "head", "half", "other"])
def test_resume_from_a_damaged_checkpoint(refused, old_run, damage):
    path = old_run / "checkpoint.pt"
    good = path.read_bytes()
    if damage == "other":
        torch.save({"model": torch.zeros(3)}, path)
    else:
        path.write_bytes(
            {"empty": b"", "text": b"hello " * 99, "head": good[:100], "half": good[: len(good) // 2]}[damage]
        )
    before = digests(old_run)
    refused("distill", "--resume", old_run, says=r"checkpoint\.pt (is damaged|is no|holds more)")
    assert digests(old_run) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sed": 1}'])
def test_resume_of_a_run_whose_settings_are_damaged(refused, old_run, text):
    (old_run / "distill.json").write_text(text)
    refused("distill", "--resume", old_run, says=r"distill\.json")


# a full disk


class file_size_limit:
    """Writing beyond `size` bytes into one file fails, as on a full disk."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *args: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("size", [400, 1000, 1500, 20_000, 200_000])
def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(refused, speech, teacher, tmp_path, size):
    out = tmp_path / "run"
    before = digests(speech)
    with file_size_limit(size):
        refused(
            "distill", speech, "-o", out, "--teacher", teacher, *STUDENT, "--log-every", 1, "--hold-out", 0.3,
            "--steps", 30, "--save-every", 30, "--validate-every", 30,
            says="cannot write .*(File too large|No space)",
        )  # fmt: skip
    assert digests(speech) == before
    for folder in (tmp_path, out):
        left = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        assert left <= {
            ".armhubert-scan.json",
            "run",
            "distill.json",
            "data.json",
            "skipped.tsv",
            "metrics.jsonl",
            "tensorboard",
        } | {
            name
            for name in ("model.safetensors", "config.json", "preprocessor_config.json", "README.md")
            if size >= 200_000
        }
    for name in ("distill.json", "config.json"):
        if (out / name).is_file():
            json.loads((out / name).read_text())


def test_a_disk_that_fills_up_during_a_resumed_run_keeps_the_last_checkpoint(call, refused, old_run):
    good = (old_run / "checkpoint.pt").read_bytes()
    with file_size_limit(len(good) // 2):
        refused("distill", "--resume", old_run, "--steps", 5, says="cannot write .*(File too large|No space)")
    assert (old_run / "checkpoint.pt").read_bytes() == good
    assert [path.name for path in old_run.glob(".*")] == [".armhubert-scan.json"]
    assert call("distill", "--resume", old_run, "--steps", 5)[0] == 0


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_the_system_refuses_is_one_line(code, monkeypatch, capsys):
    def refused() -> None:
        raise OSError(code, os.strerror(code), "/data/model")

    monkeypatch.setattr(cli, "app", refused)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert os.strerror(code).lower() in message
    assert "'/data/model'" in message
