"""`armhubert distill`: argv -> DistillConfig -> reports on the screen."""

from pathlib import Path
from typing import Annotated, Any

import typer

from armhubert.cli.app import app
from armhubert.cli.signals import stop_on_signal
from armhubert.errors import ArmhubertError

RUN, MODEL, LOSS, TRAINING = "Run", "Student", "Loss", "Training"


@app.command()
def distill(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders (searched recursively), audio files, TSV or JSONL manifests. None: bundled train-mini."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Folder of the run.", show_default="runs/distill", rich_help_panel=RUN),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON file with these settings by name; options given here win.", rich_help_panel=RUN
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Continue the run in this folder.", rich_help_panel=RUN),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew although OUT exists.", rich_help_panel=RUN)
    ] = False,
    valid: Annotated[
        list[str] | None, typer.Option(help="Held-out speech, as DATA; may be repeated.", rich_help_panel=RUN)
    ] = None,
    hold_out: Annotated[
        float | None,
        typer.Option(
            help="Share of DATA held out without --valid; 0: no validation.",
            show_default="0.05, at most 2 hours",
            rich_help_panel=RUN,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="mini (bundled), a folder, a checkpoint file, a hub id, or a torchaudio pipeline.",
            show_default="mini",
            rich_help_panel=MODEL,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="armhubert, armhubert-s, armwavlm-s, maskhubert, mini.",
            show_default="mini for the bundled teacher, else armhubert",
            rich_help_panel=MODEL,
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Student width instead of the preset's.", rich_help_panel=MODEL)
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Depth instead of the preset's.", rich_help_panel=MODEL)] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads instead of the preset's.", rich_help_panel=MODEL)
    ] = None,
    ffn: Annotated[
        int | None, typer.Option(help="Feed-forward width instead of the preset's.", rich_help_panel=MODEL)
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="C computes a map, R reuses it: CRCR..., 2by6 (6 maps of 2 layers), or C for no reuse.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    conv_layers: Annotated[
        str | None, typer.Option(help="Conv stack: '[(128, 10, 5)] + [(256, 3, 2)] * 4'.", rich_help_panel=MODEL)
    ] = None,
    attention_mode: Annotated[
        str | None,
        typer.Option(
            help="Reused maps: exact, or resoftmax, a second softmax, as released.",
            show_default="exact",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(
            help="Residual, attention and activation dropout, in place of the preset's.", rich_help_panel=MODEL
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="random, or teacher where shapes allow.", show_default="random", rich_help_panel=MODEL),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="masking, plain, star, or weighted: masking=1,star=0.5.", show_default="masking", rich_help_panel=LOSS
        ),
    ] = None,
    distance: Annotated[str | None, typer.Option(help="mse or l1.", show_default="mse", rich_help_panel=LOSS)] = None,
    layer_weight: Annotated[
        float | None, typer.Option(help="Weight of every layer but the last.", show_default="0.1", rich_help_panel=LOSS)
    ] = None,
    mask_prob: Annotated[
        float | None, typer.Option(help="p of the span mask.", show_default="0.8", rich_help_panel=LOSS)
    ] = None,
    mask_prob_end: Annotated[
        float | None, typer.Option(help="Change p linearly to this over the run.", rich_help_panel=LOSS)
    ] = None,
    mask_length: Annotated[
        int | None, typer.Option(help="Mean span length in frames.", show_default="10", rich_help_panel=LOSS)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=TRAINING)] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the data, unless --steps.", show_default="200", rich_help_panel=TRAINING),
    ] = None,
    batch_seconds: Annotated[
        float | None,
        typer.Option(help="Padded audio of a batch of one process.", show_default="96", rich_help_panel=TRAINING),
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Batches in a step of one process.", show_default="1", rich_help_panel=TRAINING)
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(help="Crop longer utterances at random.", show_default="20", rich_help_panel=TRAINING),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Peak rate.", show_default="5e-3", rich_help_panel=TRAINING),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(help="Share of the steps with rising rate.", show_default="0.05", rich_help_panel=TRAINING),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="AdamW's weight decay.", show_default="0.01", rich_help_panel=TRAINING)
    ] = None,
    beta1: Annotated[
        float | None,
        typer.Option(help="AdamW's decay of the mean gradient.", show_default="0.9", rich_help_panel=TRAINING),
    ] = None,
    beta2: Annotated[
        float | None,
        typer.Option(help="AdamW's decay of the mean square.", show_default="0.98", rich_help_panel=TRAINING),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="AdamW's epsilon.", show_default="1e-6", rich_help_panel=TRAINING)
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="Largest gradient norm.", show_default="none", rich_help_panel=TRAINING)
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16.", show_default="fp32", rich_help_panel=TRAINING)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Less memory, more time.",
            show_default="no",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    impl: Annotated[
        str | None, typer.Option(help="Kernels: auto, triton or torch.", show_default="auto", rich_help_panel=TRAINING)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto", rich_help_panel=TRAINING)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that read audio; 0: none.", show_default="6 for a GPU, else 2", rich_help_panel=TRAINING
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of first weights, held-out speech, crops, masks, dropout.", show_default="0", rich_help_panel=TRAINING
        ),
    ] = None,
    log_every: Annotated[
        int | None, typer.Option(help="Steps between reports.", show_default="10", rich_help_panel=RUN)
    ] = None,
    validate_every: Annotated[
        int | None,
        typer.Option(help="Steps between validations.", show_default="steps / 20, at least 10", rich_help_panel=RUN),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between checkpoints.", show_default="at validations, every 15 minutes", rich_help_panel=RUN
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many validations without gain.", show_default="never", rich_help_panel=RUN),
    ] = None,
) -> None:
    """Distil a teacher into an ARMHuBERT student.

    Without arguments: the bundled teacher, the bundled speech, offline. Several processes: torchrun --nproc-per-node N
    -m armhubert.cli distill ...
    """
    given = dict(locals())
    file, resumed, overwrite = given.pop("config"), given.pop("resume"), given.pop("force")
    options = {name: value for name, value in given.items() if value is not None}
    run(options, file=file, resume=resumed, force=overwrite)


def run(options: dict[str, Any], *, file: Path | None, resume: Path | None, force: bool) -> None:
    """Build the configuration from the options given and a file, distil, and show the reports."""
    from armhubert.cli.distill_screen import show_distillation
    from armhubert.distill import distill as distil
    from armhubert.distill import load_run_config
    from armhubert.distill_config import DistillConfig
    from armhubert.settings import build, read_mapping

    settings = read_mapping(file) if file else {}
    if options.keys() & {"steps", "epochs"}:  # one on the command line replaces the other in the file
        settings = {name: value for name, value in settings.items() if name not in ("steps", "epochs")}
    if "valid" in options and options.get("hold_out"):
        raise ArmhubertError("--valid is the held-out speech, and --hold-out takes some of DATA: give one of them")
    settings |= options
    source = "the options" if file is None else f"{file} and the options" if options else str(file)
    if resume is not None:
        if "out" in settings:
            raise ArmhubertError(
                f"--resume names the run's folder itself, got --out {settings['out']!r} too: leave it out"
            )
        parsed = build(DistillConfig, settings, source)
        config = load_run_config(resume, {name: getattr(parsed, name) for name in settings})
    else:
        config = build(DistillConfig, settings, source)
    with stop_on_signal() as stop:
        finished = show_distillation(distil(config, resume=resume is not None, force=force, should_stop=stop.asked))
    if finished.reason in ("stopped", "not begun"):
        stop.leave()
