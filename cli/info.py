"""`armhubert info`: what a model is, and whether it works here."""

from pathlib import Path
from typing import Annotated

import typer

from armhubert.cli import ui
from armhubert.cli.app import app
from armhubert.errors import ArmhubertError


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
    from armhubert.student import ARMHuBERT, count_parameters

    student = ARMHuBERT.from_pretrained(model)
    ui.show_model(model, student.config, count_parameters(student))
    if audio is not None:
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
        ui.show_features(audio, len(wave) / SAMPLE_RATE, features, time.perf_counter() - started)
