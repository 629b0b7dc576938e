"""`armhubert evaluate`: argv -> EvaluateConfig, a suite of them, or SimilarityConfig -> reports on the screen."""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from armhubert.cli import ui
from armhubert.cli.app import app
from armhubert.cli.options import numbers
from armhubert.cli.signals import stop_on_signal
from armhubert.errors import ArmhubertError
from armhubert.files import claim

if TYPE_CHECKING:
    from armhubert.superb import progress
    from armhubert.superb.similarity import Similarity
    from armhubert.superb.suite import SuiteFinished, SuitePlanned

RUN, DATA, TRAINING, SIMILARITY = "Run", "Data", "Training (what is not given is SUPERB's)", "--task similarity"
Show = Callable[[str, float, float | None], None]


@app.command()
def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="A student, any teacher as for distill, fbank, fbank_no_cmvn, mfcc, module:function or "
            "file.py:function; several with --suite.",
            show_default="mini; with --suite mini: fbank and mini",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="pr, asr, ks, qbe, sid, asv, sd, ic, sf, er, or similarity; with --suite several, as pr,asr.",
            show_default="pr",
            rich_help_panel=RUN,
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="superb: every task that DATA has; mini: a proxy on the bundled speech.", rich_help_panel=RUN
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="Root of the data; similarity: as distill's DATA, or the bundled test speech.",
            rich_help_panel=DATA,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", help="Folder of the run.", show_default="runs/evaluate/MODEL/TASK", rich_help_panel=RUN
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON file with these settings by name; a suite's may hold tasks: {pr: {steps: ...}}.",
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Continue the run in this folder.", rich_help_panel=RUN),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew although OUT exists.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool | None,
        typer.Option("--dry-run", help="Check data and model, take two steps, write no result.", rich_help_panel=RUN),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Folder for features: computed once, shared by tasks and runs.", rich_help_panel=RUN),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="hidden, heads, or auto: a student's heads where it has them.",
            show_default="auto",
            rich_help_panel=RUN,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto", rich_help_panel=RUN)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads that read audio.", show_default="2", rich_help_panel=RUN)
    ] = None,
    lexicon: Annotated[
        str | None,
        typer.Option(help="pr: WORD, tab, phones.", show_default="lexicon.txt beside the data", rich_help_panel=DATA),
    ] = None,
    g2p: Annotated[
        bool | None,
        typer.Option("--g2p", help="pr: machine pronunciations for words outside the lexicon.", rich_help_panel=DATA),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(
            help="Subsets to train on; may be repeated.", show_default="train-clean-100", rich_help_panel=DATA
        ),
    ] = None,
    dev: Annotated[list[str] | None, typer.Option(help="Validation subsets.", rich_help_panel=DATA)] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            help="Subsets to score; pr, asr: the first for the result, and the others too. pr: TIMIT works.",
            rich_help_panel=DATA,
        ),
    ] = None,
    fold: Annotated[int | None, typer.Option(help="er: one fold instead of all.", rich_help_panel=DATA)] = None,
    language_model: Annotated[
        str | None, typer.Option(help="asr: ARPA file for beam search.", show_default="greedy", rich_help_panel=DATA)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=TRAINING)] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Rate, constant without --warmup.", rich_help_panel=TRAINING),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Steps in which the rate rises from 0; it falls to 0 in the others. s3prl's schedule: 1400.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="lr: try 1e-1 ... 1e-7, give up bad ones, choose on dev.", rich_help_panel=TRAINING),
    ] = None,
    rates: Annotated[
        str | None, typer.Option(help="Rates of the sweep: 1e-2,1e-3,1e-4.", rich_help_panel=TRAINING)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Utterances a batch.", rich_help_panel=TRAINING)] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches a step.", rich_help_panel=TRAINING)] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm.", rich_help_panel=TRAINING)] = None,
    optimizer: Annotated[str | None, typer.Option(help="Adam or AdamW.", rich_help_panel=TRAINING)] = None,
    head_size: Annotated[
        int | None, typer.Option(help="asr, sf: units of the LSTMs.", show_default="1024", rich_help_panel=TRAINING)
    ] = None,
    crop_seconds: Annotated[
        float | None,
        typer.Option(help="Train on random crops, but for pr, asr, sf; 0: whole utterances.", rich_help_panel=TRAINING),
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations.", rich_help_panel=TRAINING)
    ] = None,
    normalize_layers: Annotated[
        bool | None,
        typer.Option("--normalize-layers", help="Layer norm before the weighted sum.", rich_help_panel=TRAINING),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of all random numbers.", show_default="0", rich_help_panel=TRAINING)
    ] = None,
    against: Annotated[str | None, typer.Option(help="The teacher.", rich_help_panel=SIMILARITY)] = None,
    utterances: Annotated[
        int | None, typer.Option(help="How many are compared.", show_default="50", rich_help_panel=SIMILARITY)
    ] = None,
) -> None:
    """Judge features by SUPERB: frozen model, learned sum of layers, SUPERB's heads, metrics and settings."""
    given = {name: value for name, value in locals().items() if value is not None}
    for name in ("config", "resume", "force", "task", "suite", "model", "out", "data", "against"):
        given.pop(name, None)
    if "rates" in given:
        given["rates"] = numbers(given["rates"], float, "--rates")
    if task == "similarity" and suite is None:
        options = {"--config": config, "--resume": resume}
        if unfit := [name for name, value in options.items() if value]:
            raise ArmhubertError(f"similarity takes no {unfit[0]}: leave it out")
        similarity(model or [], against, data or [], out, given, force)
        return
    for name, value in (("--against", against), ("--utterances", utterances)):
        if value is not None:
            raise ArmhubertError(f"{name} is for --task similarity: leave it out")
    from armhubert.settings import read_mapping

    settings = {**(read_mapping(config) if config else {}), **given}
    root = data[0] if data else None
    if data is not None and len(data) > 1:
        raise ArmhubertError(f"give one --data, got {len(data)}: a task reads one root")
    if suite is not None:
        if suite not in ("superb", "mini"):
            raise ArmhubertError(f"suite must be superb or mini, got {suite!r}")
        if resume is not None or force:
            raise ArmhubertError(
                "a suite goes on where it was stopped and repeats nothing that is done: leave out "
                f"--{'force' if resume is None else 'resume'}, or name another --out to start anew"
            )
        only = [name.strip() for name in (task or "").split(",") if name.strip()]
        run_suite(suite, model or (["fbank", "mini"] if suite == "mini" else []), root, out, settings, only)
    else:
        run_task(model or [], task, root, out, settings, resume, force)


def run_task(
    models: Sequence[str],
    task: str | None,
    root: str | None,
    out: str | None,
    settings: dict[str, Any],
    resume: Path | None,
    force: bool,
) -> None:
    """One model on one task."""
    from armhubert.settings import build
    from armhubert.superb import runner
    from armhubert.superb.config import EvaluateConfig
    from armhubert.superb.progress import Finished
    from armhubert.superb.suite import label
    from armhubert.superb.upstream import names_code

    if len(models) > 1:
        raise ArmhubertError(f"give one model, got {', '.join(models)}: several are for --suite")
    named = {"model": models[0] if models else None, "task": task, "data": root, "out": out}
    settings |= {name: value for name, value in named.items() if value is not None}
    if resume is not None:
        config = runner.load_run_config(resume, settings)
    else:
        config = build(EvaluateConfig, settings, "the settings")
        if "out" not in settings:
            config = dataclasses.replace(config, out=f"{config.out}/{label(config.model)}/{config.task}")
    if names_code(config.model) and config.model not in models:
        raise ArmhubertError(
            f"a model that is code must be named on the command line, a file names {config.model!r}: name it again, if "
            "you trust it"
        )
    with stop_on_signal() as stop, ui.progress() as bar:
        for report in runner.evaluate(config, resume=resume is not None, force=force, should_stop=stop.asked):
            show(report, bar)
    if isinstance(report, Finished) and report.reason == "stopped":
        stop.leave()


def run_suite(
    suite: str,
    models: Sequence[str],
    root: str | None,
    out: str | None,
    settings: dict[str, Any],
    only: Sequence[str],
) -> None:
    """Several models on several tasks."""
    from armhubert.superb.progress import Finished
    from armhubert.superb.report import write_report
    from armhubert.superb.suite import MINI_NOTE, SuiteFinished, TaskBegun, TaskFailed, plan_suite, settings_of
    from armhubert.superb.suite import run_suite as run

    common, per_task = settings_of(settings)
    root = str(root or common.get("data") or "")
    common.pop("data", None)
    if suite == "superb" and not models:
        raise ArmhubertError("--suite superb needs a model: armhubert evaluate MODEL --suite superb --data ROOT")
    folder = out or f"runs/{suite}"
    plan = plan_suite(suite, models, root, folder, common, per_task, only)
    show_plan(plan)
    with stop_on_signal() as stop, ui.progress() as bar:
        for report in run(plan, Path(folder), should_stop=stop.asked):
            if isinstance(report, TaskBegun):
                ui.say(f"[{report.number}/{report.total}] {report.config.model} on {report.config.task}")
            elif isinstance(report, TaskFailed):
                ui.error(report.error)
            elif not isinstance(report, SuiteFinished) and not (isinstance(report, Finished) and stop.asked()):
                show(report, bar)
    assert isinstance(report, SuiteFinished)
    if report.reason == "stopped":
        ui.say("Stopped; the same command goes on.")
        stop.leave()
    if not common.get("dry_run"):
        ui.draw(suite_table(report))
        if suite == "mini":
            ui.say(MINI_NOTE)
        for place in report.left_out:
            ui.note(f"not in the report: {place}, a run with other settings")
        ui.say(f"report: {write_report(report)}")
    if report.failed:
        raise ArmhubertError(
            f"{report.failed} of {len(plan.configs)} evaluations failed, see above: the same command tries them again"
        )


def show_plan(plan: "SuitePlanned") -> None:
    """What a suite will run and what it leaves out."""
    for task, reason in plan.skipped.items():
        ui.note(f"{task} is left out: {reason}")
    tasks = list(dict.fromkeys(config.task for config in plan.configs))
    ui.note(f"{len(plan.configs)} evaluations: {', '.join(tasks)}")


def suite_table(finished: "SuiteFinished") -> Table:
    """Our rows, and SUPERB's published ones under them."""
    from armhubert.superb.suite import COLUMNS, PUBLISHED, overall, printed, row_of, superb_score

    superb = finished.columns == COLUMNS
    table = Table("model", *(column.title for column in finished.columns), *(("overall", "SUPERB_s") if superb else ()))
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, row: Sequence[float | None], style: str | None) -> None:
        cells = [column.shown(value) for value, column in zip(row, finished.columns, strict=True)]
        if superb:
            cells += [printed(overall(tuple(row)), 1), printed(superb_score(tuple(row)), 0)]
        table.add_row(name, *cells, style=style)

    for name, results in finished.results.items():
        add(name, row_of(results, finished.columns), None)
    if superb:
        table.add_section()
        for name, row in PUBLISHED.items():
            add(f"{name} (published)", row, "dim")
    return table


# ---- reports ---------------------------------------------------------------


def show(report: "progress.Report", bar: Show) -> None:
    """One report of an evaluation: progress to the bar, facts as lines of `kind key=value ...`."""
    from armhubert.data import Scanning
    from armhubert.superb import progress

    if isinstance(report, Scanning):
        bar("examine audio", report.done, report.total)
    elif isinstance(report, progress.Started):
        _show_start(report)
    elif isinstance(report, progress.CachePlanned):
        plan = report.plan
        if plan.items:
            ui.say(
                f"cache items={plan.items} write={plan.bytes / 1e9:.2f}GB free={plan.free / 1e9:.1f}GB "
                f"folder={shlex.quote(str(plan.folder))}"
            )
    elif isinstance(report, progress.Caching):
        bar("compute features", report.done, report.total)
    elif isinstance(report, progress.Searching):
        bar("search", report.done, report.total)
    elif isinstance(report, progress.Progress):
        if sys.stderr.isatty():
            bar(f"train, loss {report.loss:.4f}", report.step, report.steps)
        else:
            ui.say(
                f"train step={report.step} of={report.steps} loss={report.loss:.5f} lr={report.learning_rate:.2e} "
                f"grad_norm={report.gradient_norm:.3f} eta={report.eta:.0f}"
            )
    elif isinstance(report, progress.Validated):
        ui.say(f"dev step={report.step} {_pairs(report.metrics)}{' best' if report.best else ''}")
    elif isinstance(report, progress.RateTried):
        value = "diverged" if report.metric is None else f"{report.metric:.4f}"
        ui.say(f"rate={report.rate:g} step={report.step} dev={value} {'kept' if report.kept else 'given up'}")
    elif isinstance(report, progress.Finished):
        _show_end(report)


def _show_start(report: "progress.Started") -> None:
    task = f"{report.task.name} ({report.task.title.lower()})" + (f", fold {report.fold}" if report.fold else "")
    upstream = report.upstream
    ui.say(
        f"start model={shlex.quote(upstream.source)} parameters={upstream.parameters} features={upstream.features} "
        f"layers={upstream.count} width={upstream.width} task={shlex.quote(task)} "
        f"head_parameters={report.parameters} steps={report.steps} first_step={report.first_step} "
        f"device={shlex.quote(report.device)}"
    )
    ui.say("data " + " ".join(f"{name}={items}({seconds / 3600:.2f}h)" for name, (items, seconds) in
                              report.splits.items()))  # fmt: skip
    for note in report.notes:
        ui.note(f"note: {note}")
    if report.changed:
        ui.say(f"not SUPERB's: {' '.join(f'{name}={value}' for name, value in report.changed.items())}")


def _show_end(report: "progress.Finished") -> None:
    from armhubert.superb.report import write_pictures

    out = shlex.quote(str(report.out))
    if report.reason == "stopped":
        ui.say(f"Stopped. Go on with:  armhubert evaluate --resume {out}")
    elif report.reason == "dry run":
        ui.say("dry run: data, model and head work; nothing was written")
    else:
        result = report.result
        for path in write_pictures(result, report.out):
            ui.note(f"wrote {path}")
        for name, metrics in result["tests"].items():
            if name != "test":
                ui.say(f"{name} {_pairs(metrics)}")
        ui.say(f"test {_pairs(result['metrics'])} wall_seconds={result['wall_seconds']:.0f} out={out}")


def _pairs(metrics: "Any") -> str:
    return " ".join(f"{name}={value:.4f}" for name, value in metrics.items())


# ---- similarity ------------------------------------------------------------


def similarity(
    models: Sequence[str],
    against: str | None,
    data: Sequence[str],
    out: str | None,
    given: dict[str, Any],
    force: bool,
) -> None:
    """Compare a student with its teacher on speech, without training."""
    from armhubert.bundled import TEST_SPEECH
    from armhubert.superb.similarity import Comparing, SimilarityConfig, compare, write

    if len(models) != 1 or against is None:
        raise ArmhubertError("similarity compares one student with --against TEACHER: give both")
    extra = {name: given.pop(name) for name in ("device", "seed", "utterances") if name in given}
    if wrong := sorted(name for name, value in given.items() if value is not False):
        raise ArmhubertError(f"similarity takes no --{wrong[0].replace('_', '-')}: leave it out")
    config = SimilarityConfig(
        model=models[0],
        against=against,
        data=tuple(data) or (str(TEST_SPEECH),),
        out=out or "runs/similarity",
        **extra,
    )
    claim([Path(config.out) / "similarity.json"], force)
    with ui.progress() as bar:
        for report in compare(config):
            if isinstance(report, Comparing):
                bar("compare", report.done, report.total)
    assert not isinstance(report, Comparing)
    ui.draw(similarity_table(report))
    skipped = f"; {report.skipped} files could not be read" if report.skipped else ""
    of = ", ".join(data) or "the bundled test speech"
    ui.say(f"{report.utterances} utterances, {report.frames} frames of {of}{skipped}")
    for path in write(report, config):
        ui.say(f"wrote {path}")


def similarity_table(result: "Similarity") -> Table:
    """One row a student layer, against its teacher layer and against the nearest."""
    table = Table("layer", "teacher layer", "CKA", "highest CKA", f"cosine ({result.cosine_by})", "map overlap")
    rows: Iterable[tuple[int, int]] = enumerate(result.mapping, start=1)
    for layer, target in rows:
        nearest = max(range(len(result.cka[layer])), key=result.cka[layer].__getitem__)
        overlap = result.maps[layer - 1]
        table.add_row(
            str(layer),
            str(target),
            f"{result.cka[layer][target]:.3f}",
            f"{result.cka[layer][nearest]:.3f} at {nearest}",
            f"{result.cosine[layer - 1]:.3f}",
            "–" if overlap is None else f"{overlap:.3f}",
        )
    return table
