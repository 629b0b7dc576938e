"""`armhubert info`: what a model is, and whether it works here."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from armhubert.cli import ui
from armhubert.cli.app import app
from armhubert.errors import ArmhubertError

if TYPE_CHECKING:
    from torch import Tensor

    from armhubert.config import EncoderConfig
    from armhubert.student import ParameterCount


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A student's folder, a released .ckpt, or a teacher as for distill.")],
    audio: Annotated[Path | None, typer.Option(help="Run the model on this recording and tell what came out.")] = None,
) -> None:
    """Tell what a model is: architecture, parameters, reuse pattern; with --audio, run it."""
    import time

    import torch

    from armhubert.audio import read_audio
    from armhubert.config import SAMPLE_RATE
    from armhubert.convert import load_weights
    from armhubert.machine import memory_errors
    from armhubert.student import ARMHuBERT, count_parameters

    weights = load_weights(model)
    student = ARMHuBERT.from_weights(weights)
    _show_model(model, student.config, count_parameters(student))
    if weights.ignored:
        ui.note(f"{ui.grouped(weights.ignored)}: no part of the encoder, and left out")
    if audio is None:
        return
    with memory_errors(f"memory must hold all of {audio}: name a shorter recording, or use armhubert extract"):
        wave, shortest = read_audio(audio), student.config.receptive_field
        if len(wave) < shortest:
            raise ArmhubertError(
                f"{audio} must have at least {shortest} samples at 16 kHz (one frame), got {len(wave)}: name another"
            )
        if not wave.isfinite().all():
            raise ArmhubertError(f"{audio} must have finite samples, got NaN or infinity: name another")
        started = time.perf_counter()
        with torch.inference_mode():
            features = student(wave[None], projections=False).last_hidden_state
        _show_features(audio, len(wave) / SAMPLE_RATE, features, time.perf_counter() - started)


def _show_model(source: str, config: "EncoderConfig", count: "ParameterCount") -> None:
    """What a model is."""
    rows: dict[str, Any] = {
        "model": source,
        "parameters": f"{count.total:,}, without heads {count.without_heads:,}",
        "layers": f"{config.layers} of {config.sizes}",
        "pattern": f"{config.pattern}, maps read as {config.attention_mode}",
        "frames": f"one every {config.hop} samples of 16 kHz",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, str(value))
    ui.draw(table)


def _show_features(audio: Path, seconds: float, features: "Tensor", elapsed: float) -> None:
    """What a model made of a recording."""
    ui.say(
        f"{audio.name}: {seconds:.2f} s -> features {list(features.shape)}, mean {features.mean():.3f}, "
        f"deviation {features.std():.3f}, in {elapsed * 1e3:.0f} ms"
    )
