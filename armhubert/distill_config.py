"""What a distillation run is told: one flat, frozen set of settings, from the command line or a file."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from armhubert.bundled import TRAINING_SPEECH
from armhubert.config import MAX_LAYERS, MAX_SIZE, SAMPLE_RATE, AttentionMode, EncoderConfig, parse_conv_layers, preset
from armhubert.data import MAX_WORKERS
from armhubert.errors import ArmhubertError
from armhubert.kernels import Distance, Impl
from armhubert.losses import parse_loss
from armhubert.settings import check_fields, documented

_MOST = {"layers": MAX_LAYERS, "mask_length": MAX_SIZE, "accumulate": 10_000, "workers": MAX_WORKERS}
"""What settings may be at most: more would fill the memory, or overflow."""


@documented
@dataclass(frozen=True)
class DistillConfig:
    """Settings of `armhubert distill`; the defaults are the published ones where there are any.

    Raises:
        ArmhubertError: a setting breaks a rule; the message names the rule, the value and the remedy.
    """

    out: str = "runs/distill"
    """Folder of the run: student, checkpoint, metrics, pictures."""
    data: tuple[str, ...] = ()
    """Folders, audio files, TSV or JSONL manifests; none: the bundled train-mini."""
    valid: tuple[str, ...] = ()
    """Held-out speech, as `data`, and left out of training where it lies within it; none: a share of the data."""
    hold_out: float | None = None
    """Share of the data held out for validation where `valid` is not given; 0: no validation; none: 0.05, at most
    two hours."""
    teacher: str = "mini"
    """`mini` (bundled), a Hugging Face folder, a checkpoint file, a hub id, or a torchaudio pipeline."""

    preset: str | None = None
    """Student: armhubert, armhubert-s, armwavlm-s, maskhubert or mini; none: mini for teacher mini, else armhubert."""
    width: int | None = None
    """Student width instead of the preset's."""
    layers: int | None = None
    """Student depth instead of the preset's."""
    heads: int | None = None
    """Attention heads instead of the preset's."""
    ffn: int | None = None
    """Feed-forward width instead of the preset's."""
    pattern: str | None = None
    """Reuse pattern instead of the preset's: CRCR..., or NbyM; C for no reuse."""
    conv_layers: str | None = None
    """Conv stack instead of the preset's, written like [(128, 10, 5)] + [(256, 3, 2)] * 4."""
    attention_mode: AttentionMode = "exact"
    """How reusing layers read the map: exact, as in the paper, or resoftmax, as the released weights were trained."""
    dropout: float | None = None
    """Residual, attention and activation dropout instead of the preset's."""
    init: Literal["random", "teacher"] = "random"
    """Start from random weights, or from the teacher's where shapes allow."""

    loss: str = "masking"
    """masking, plain or star, or a weighted sum such as masking=1,star=0.5."""
    distance: Distance = "mse"
    """Distance of the masking and plain losses: mse or l1."""
    layer_weight: float = 0.1
    """Weight of every layer's loss but the last's, which has 1."""
    mask_prob: float = 0.8
    """Mask probability p (published: 0.8 for 960 h, 0.4 for 100 h)."""
    mask_prob_end: float | None = None
    """Change p linearly to this value over the run; none: constant."""
    mask_length: int = 10
    """Mean span length in frames."""

    steps: int | None = None
    """Optimizer steps; none: by epochs."""
    epochs: float | None = None
    """Passes over the data where steps is not given; none: 200, as published."""
    batch_seconds: float = 96.0
    """Padded audio of one batch of one process, in seconds."""
    accumulate: int = 1
    """Batches of each process in one optimizer step."""
    max_seconds: float = 20.0
    """Longer utterances are cropped at random to this length."""
    learning_rate: float = 5e-3
    """Peak learning rate."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises linearly; then it falls linearly to 0."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    beta1: float = 0.9
    """AdamW's first beta."""
    beta2: float = 0.98
    """AdamW's second beta."""
    epsilon: float = 1e-6
    """AdamW's epsilon."""
    clip: float | None = None
    """Largest gradient norm; none: no clipping, as published."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the matrix products; fp16 uses loss scaling."""
    gradient_checkpointing: bool = False
    """Recompute each layer in backward: less memory, more time."""
    impl: Impl = "auto"
    """Implementation of the kernels: auto, triton or torch."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int | None = None
    """Processes that read audio, 0 for none; unset: 6 for a GPU, 2 for a CPU. Where Python does not fork them (macOS,
    Windows, any system from Python 3.14 on) they run your script again: put its work under
    `if __name__ == "__main__":`."""
    seed: int = 0
    """Seed of all random numbers."""

    log_every: int = 10
    """Steps between two progress reports."""
    validate_every: int | None = None
    """Steps between two validations; none: a twentieth of the run, at least 10."""
    save_every: int | None = None
    """Steps between two checkpoints; none: at every validation, and a quarter of an hour after the last one."""
    patience: int | None = None
    """Stop early after this many validations without improvement; none: never."""

    def __post_init__(self) -> None:
        check_fields(self)
        parse_loss(self.loss)
        if self.steps is not None and self.epochs is not None:
            raise ArmhubertError(f"give steps or epochs, not both, got {self.steps} and {self.epochs}")
        for name in ("width", "layers", "heads", "ffn", "steps", "epochs", "accumulate", "batch_seconds", "max_seconds",
                     "mask_length", "log_every",
                     "validate_every", "save_every", "patience", "learning_rate", "epsilon", "clip"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ArmhubertError(f"{name} must be above 0, got {value}")
        for name in ("mask_prob", "mask_prob_end", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ArmhubertError(f"{name} must be within 0 and 1, got {value}")
        for name in ("hold_out", "beta1", "beta2", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ArmhubertError(f"{name} must be at least 0 and below 1, got {value}")
        for name in ("layer_weight", "weight_decay", "workers", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ArmhubertError(f"{name} must be at least 0, got {value}")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise ArmhubertError(f"{name} must be at most {most}, got {value}")
        for name in ("batch_seconds", "max_seconds"):
            if getattr(self, name) < 1 / SAMPLE_RATE:
                raise ArmhubertError(
                    f"{name} must be at least one sample, {1 / SAMPLE_RATE}, got {getattr(self, name)}"
                )

    @property
    def sources(self) -> tuple[str, ...]:
        """The training speech: `data`, or the bundled train-mini."""
        return self.data or (str(TRAINING_SPEECH),)

    @property
    def terms(self) -> dict[str, float]:
        """Weight of each loss term."""
        return parse_loss(self.loss)


# What may differ when a run is resumed: how long it goes on, how it is carried out, and where its inputs lie (their
# content is checked, and accumulate times processes), not what it computes.
RESUMABLE = frozenset(
    {"out", "data", "valid", "teacher", "accumulate"}
    | {"steps", "epochs", "workers", "device", "log_every", "validate_every", "save_every", "patience", "impl"}
    | {"gradient_checkpointing"}
)


def student_config(config: DistillConfig, teacher: EncoderConfig) -> EncoderConfig:
    """The student that `config` asks for, with heads as wide as the teacher and the teacher's input normalisation.

    Raises:
        ArmhubertError: the settings do not make a model, or its frames do not line up with the teacher's.
    """
    base = preset(config.preset or ("mini" if config.teacher == "mini" else "armhubert"))
    width = config.width or base.width
    layers = config.layers or base.layers
    if config.conv_layers is not None:
        stack = parse_conv_layers(config.conv_layers)
        if not stack:
            raise ArmhubertError(f"conv_layers must hold at least one layer, got {config.conv_layers!r}")
    else:  # the presets' last convolutions are as wide as the model
        stack = tuple((width if c == base.width else c, kernel, stride) for c, kernel, stride in base.conv_layers)
    pattern = config.pattern
    if pattern is None:
        pattern = (base.pattern[:2] * layers)[:layers] if layers != base.layers else base.pattern
    elif pattern.strip().upper() == "C":
        pattern = "C" * layers
    changes: dict[str, object] = {
        "conv_layers": stack,
        "feature_projection": stack[-1][0] != width,
        "width": width,
        "layers": layers,
        "heads": config.heads or base.heads,
        "ffn": config.ffn or base.ffn,
        "pattern": pattern,
        "attention_mode": config.attention_mode,
        "projection_width": teacher.width if config.terms.keys() & {"masking", "plain"} else None,
        "normalize_input": teacher.normalize_input,
    }
    if config.dropout is not None:
        changes |= dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), config.dropout)
    student = dataclasses.replace(base, **changes)  # type: ignore[arg-type]
    if (student.hop, student.receptive_field) != (teacher.hop, teacher.receptive_field):
        raise ArmhubertError(
            "student and teacher must have the same frames: the student's conv stack gives one every "
            f"{student.hop} samples over {student.receptive_field}, the teacher's one every {teacher.hop} over "
            f"{teacher.receptive_field}: choose another conv_layers"
        )
    return student
