"""What an encoder is, as frozen data: its settings and the published presets."""

import dataclasses
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

from armhubert.errors import ArmhubertError, nearest, shown
from armhubert.kernels import AttentionMode
from armhubert.settings import check_fields, documented

ConvLayer = tuple[int, int, int]
"""(output channels, kernel, stride) of one waveform convolution."""

SAMPLE_RATE = 16_000
"""Samples a second of everything this package computes on."""

MAX_LAYERS = 1000
MAX_SIZE = 2**20
"""Far above any encoder; beyond them a configuration is damaged, and its shapes would overflow."""


@documented
@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """One speech encoder, teacher or student: waveform convolutions, positional convolution, Transformer layers.

    Raises:
        ArmhubertError: a setting breaks a rule; the message names the rule, the value and the remedy.
    """

    conv_layers: tuple[ConvLayer, ...]
    """(channels, kernel, stride) of each waveform convolution; the product of the strides is the samples a frame."""
    width: int
    """D, the width of the residual stream."""
    layers: int
    """Number of Transformer layers."""
    heads: int
    """Attention heads; must divide the width. A head's width is width / heads, also where `layer_heads` drops some."""
    ffn: int
    """Inner width of the feed-forward blocks; with `layer_ffn`, of the widest that there may be."""
    pattern: str = ""
    """One letter a layer: C computes its attention map, R reuses the last computed one. Empty: all compute."""
    attention_mode: AttentionMode = "exact"
    """How a reusing layer reads the map: `exact` as in the paper, `resoftmax` for weights of the released code."""
    projection_width: int | None = None
    """D_t, output width of the distillation heads (one linear map a layer); None: no heads."""
    scale_layer_gradients: bool = False
    """Scale the gradients of distillation through the heads as the ARM students do: see
    `armhubert.encoder.scale_gradient`."""
    conv_norm: Literal["group", "layer"] = "group"
    """`group`: one group a channel after the first convolution only; `layer`: LayerNorm over channels after all."""
    conv_bias: bool = False
    """Whether the waveform convolutions have biases."""
    feature_norm: bool = True
    """LayerNorm over the convolution's channels before the encoder."""
    feature_projection: bool = False
    """Linear map from the convolution's channels to `width`; required where the two differ."""
    mask_embedding: bool = True
    """Whether the model has an embedding for masked frames; torchaudio's teachers have lost theirs."""
    norm_first: bool = False
    """Pre-norm Transformer layers (Large models) instead of post-norm (Base models)."""
    position_kernel: int = 128
    """Kernel of the convolutional positional embedding, in frames."""
    position_groups: int = 16
    """Groups of that convolution."""
    position_buckets: int = 0
    """WavLM's gated relative position bias: number of distance buckets (320); 0: no bias."""
    position_max_distance: int = 800
    """Distance in frames beyond which all positions share WavLM's last bucket."""
    norm_eps: float = 1e-5
    """Epsilon of every normalisation but the convolutions', which have PyTorch's own in every model of this family."""
    dropout: float = 0.0
    """On each block's output before it joins the residual stream, and after the positional embedding."""
    attention_dropout: float = 0.0
    """On the attention probabilities of computing layers."""
    activation_dropout: float = 0.0
    """On the activations inside the feed-forward blocks."""
    input_dropout: float = 0.0
    """On the encoder's input frames."""
    normalize_input: bool = False
    """Shift and scale each waveform to zero mean and unit variance first (Hugging Face's `do_normalize`)."""
    padding: Literal["independent", "as_trained"] = "independent"
    """`independent`: an utterance's features never depend on its batch. `as_trained`: padding enters the first group
    norm, as in fairseq, transformers and torchaudio, for heads that were trained on such features."""
    layer_heads: tuple[tuple[int, ...], ...] | None = None
    """Pruned models: which of the `heads` heads each layer has kept, ascending; (): a layer without attention.
    The numbers tell WavLM's position biases apart, elsewhere only their count matters. None: every layer has all."""
    layer_ffn: tuple[int, ...] | None = None
    """Pruned models: inner width of each layer's feed-forward block, 0: a layer without one. None: `ffn` everywhere."""
    feature_scale: bool = False
    """Pruned models: a learned factor on each of the convolution's channels, before `feature_norm`."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("width", "layers", "heads", "ffn", "position_kernel", "position_groups"):
            most = MAX_LAYERS if name == "layers" else MAX_SIZE
            if not 1 <= getattr(self, name) <= most:
                raise ArmhubertError(f"{name} must be at least 1 and at most {most}, got {getattr(self, name)}")
        object.__setattr__(self, "pattern", parse_pattern(self.pattern, self.layers))
        if self.width % self.heads:
            raise ArmhubertError(f"width must be divisible by heads, got width {self.width} and heads {self.heads}")
        if self.width % self.position_groups:
            raise ArmhubertError(
                f"width must be divisible by position_groups, got {self.width} and {self.position_groups}: choose a "
                f"multiple of {self.position_groups}"
            )
        if not self.conv_layers:
            raise ArmhubertError("conv_layers must hold at least one (channels, kernel, stride), got none")
        if any(len(layer) != 3 or min(layer) < 1 for layer in self.conv_layers):
            raise ArmhubertError(f"conv_layers must be (channels, kernel, stride) of 1 or more, got {self.conv_layers}")
        if max(map(max, self.conv_layers)) > MAX_SIZE:
            raise ArmhubertError(f"conv_layers must hold numbers of at most {MAX_SIZE}, got {self.conv_layers}")
        if not self.feature_projection and self.conv_layers[-1][0] != self.width:
            raise ArmhubertError(
                f"the last convolution has {self.conv_layers[-1][0]} channels and width is {self.width}: "
                "make them equal or set feature_projection"
            )
        if self.position_buckets and not 4 <= self.position_buckets <= MAX_SIZE:
            raise ArmhubertError(
                f"position_buckets must be 0 or at least 4 and at most {MAX_SIZE}, got {self.position_buckets}"
            )
        if self.position_buckets and self.position_max_distance <= self.position_buckets // 4:
            raise ArmhubertError(
                f"position_max_distance must be above a quarter of position_buckets, got {self.position_max_distance} "
                f"and {self.position_buckets}"
            )
        if not 0 < self.norm_eps < 1:
            raise ArmhubertError(f"norm_eps must be above 0 and below 1, got {self.norm_eps}")
        if self.position_buckets and "R" in self.pattern:
            raise ArmhubertError("reusing layers have no relative position bias: set position_buckets to 0")
        for name in ("dropout", "attention_dropout", "activation_dropout", "input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ArmhubertError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.projection_width is not None and not 1 <= self.projection_width <= MAX_SIZE:
            raise ArmhubertError(
                f"projection_width must be at least 1 and at most {MAX_SIZE} or null, got {self.projection_width}"
            )
        self._check_pruning()

    def _check_pruning(self) -> None:
        for name in ("layer_heads", "layer_ffn"):
            values = getattr(self, name)
            if values is not None and len(values) != self.layers:
                raise ArmhubertError(f"{name} must have one entry a layer: {self.layers} layers, got {len(values)}")
        if self.layer_heads is not None and "R" in self.pattern:
            raise ArmhubertError("layer_heads needs layers that all compute their maps: reused maps have all heads")
        for kept in self.layer_heads or ():
            if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < self.heads):
                raise ArmhubertError(
                    f"layer_heads must be ascending lists of heads 0..{self.heads - 1}, got {shown(kept)}"
                )
        if self.layer_ffn is not None and not all(0 <= width <= self.ffn for width in self.layer_ffn):
            raise ArmhubertError(f"layer_ffn must lie in 0..{self.ffn}, the ffn, got {shown(self.layer_ffn)}")

    def as_dict(self) -> dict[str, Any]:
        """All settings by name, for files; those that only pruned models have are left out elsewhere."""
        values = dataclasses.asdict(self)
        for name, absent in (("layer_heads", None), ("layer_ffn", None), ("feature_scale", False)):
            if values[name] == absent:
                del values[name]
        return values

    def kept_heads(self, layer: int) -> tuple[int, ...]:
        """The heads of layer 0..L-1; empty: it has no attention."""
        return tuple(range(self.heads)) if self.layer_heads is None else self.layer_heads[layer]

    def ffn_width(self, layer: int) -> int:
        """Inner width of the feed-forward block of layer 0..L-1; 0: it has none."""
        return self.ffn if self.layer_ffn is None else self.layer_ffn[layer]

    @property
    def sizes(self) -> str:
        """Width, heads and feed-forward width in words; ranges where layers differ."""
        heads, ffn = str(self.heads), str(self.ffn)
        if self.layer_heads is not None:
            heads = f"{_span([len(kept) for kept in self.layer_heads])} of {heads}"
        if self.layer_ffn is not None:
            ffn = _span(self.layer_ffn)
        return f"width {self.width}, {heads} heads, FFN {ffn}"

    @property
    def receptive_field(self) -> int:
        """Samples that the first frame needs; a shorter waveform has no frame."""
        field = 1
        for _, kernel, stride in reversed(self.conv_layers):
            field = (field - 1) * stride + kernel
        return field

    @property
    def hop(self) -> int:
        """Samples between two frames."""
        hop = 1
        for _, _, stride in self.conv_layers:
            hop *= stride
        return hop

    def frames(self, samples: Any) -> Any:
        """Frames that `samples` samples give: an int for an int, a tensor for a tensor; 0 or less where a frame needs
        more samples."""
        for _, kernel, stride in self.conv_layers:
            samples = (samples - kernel) // stride + 1
        return samples

    def macs(self, samples: int) -> int:
        """Multiply-accumulates of one utterance of `samples` samples, as the papers count them.

        Convolutions, linear maps and the two attention products of every layer; a reusing layer has one, since its map
        is there already (recomputing it tile by tile, as some of our kernels do, is a choice of speed and not counted).
        The distillation heads count where the configuration has them.
        """
        total, channels, length = 0, 1, samples
        for outputs, kernel, stride in self.conv_layers:
            length = (length - kernel) // stride + 1
            total += length * outputs * channels * kernel
            channels = outputs
        width, frames = self.width, length
        if self.feature_projection:
            total += frames * channels * width
        total += (frames + 1 - self.position_kernel % 2) * width * width // self.position_groups * self.position_kernel
        for layer, letter in enumerate(self.pattern):
            linears, products = (4, 2) if letter == "C" else (2, 1)
            kept = len(self.kept_heads(layer)) * width // self.heads
            total += linears * frames * width * kept + products * frames**2 * kept
            total += 2 * frames * width * self.ffn_width(layer)
            if self.position_buckets:
                total += frames * kept * 8
        if self.projection_width:
            total += self.layers * frames * width * self.projection_width
        return total


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


# ---- reuse patterns and conv stacks ----------------------------------------


def parse_pattern(pattern: str, layers: int) -> str:
    """The one-letter form of a reuse pattern: "CRCR...", "compute,reuse,...", "NbyM" (M maps of N layers each) or "".

    Raises:
        ArmhubertError: unparsable, of another length than `layers`, or beginning with a reusing layer.
    """
    text = pattern.strip()
    if text == "":
        return "C" * layers
    if match := re.fullmatch(r"(\d{1,9})by(\d{1,9})", text):
        span, count = map(int, match.groups())
        if span < 1:
            raise ArmhubertError(f"pattern 'NbyM' needs N of at least 1, got {pattern!r}")
        if span * count != layers:  # before any text of that length is made
            raise ArmhubertError(
                f"pattern must have one letter a layer: {layers} layers, got {span * count} in {pattern!r}"
            )
        letters = ("C" + "R" * (span - 1)) * count
    else:
        letters = text.replace("compute", "C").replace("reuse", "R").replace(",", "").replace(" ", "").upper()
        if set(letters) - {"C", "R"}:
            raise ArmhubertError(
                f"pattern must be made of C (compute) and R (reuse), one letter a layer, or NbyM, got {shown(pattern)}"
            )
    if len(letters) != layers:
        raise ArmhubertError(
            f"pattern must have one letter a layer: {layers} layers, got {len(letters)} in {pattern!r}"
        )
    if letters.startswith("R"):
        raise ArmhubertError(f"the first layer must compute its attention map, got pattern {pattern!r}: begin with C")
    return letters


_CONV_TERM = re.compile(r"\[((?:\(\d+,\d+,\d+\),?)+)\](?:\*(\d+))?")


def parse_conv_layers(text: str) -> tuple[ConvLayer, ...]:
    """A conv stack written as in fairseq, `[(128, 10, 5)] + [(256, 3, 2)] * 4`; read by a grammar, never evaluated.

    Raises:
        ArmhubertError: anything that is not a sum of lists of integer triples, each with an optional repeat.
    """
    rule = "conv_layers must read like '[(128, 10, 5)] + [(256, 3, 2)] * 4'"
    layers: list[ConvLayer] = []
    if len(text) > 2000:
        raise ArmhubertError(f"{rule}, got {len(text)} characters")
    for term in re.sub(r"\s", "", text).split("+"):
        match = _CONV_TERM.fullmatch(term)
        repeat = int(match[2] or 1) if match else 0
        if match is None or repeat > 100:
            raise ArmhubertError(f"{rule}, got {text!r}")
        triples = [tuple(map(int, triple.split(","))) for triple in re.findall(r"\(([\d,]+)\)", match[1])]
        layers += typing.cast(list[ConvLayer], triples) * repeat
    return tuple(layers)


# ---- presets ---------------------------------------------------------------


def _arm(width: int, ffn: int, **settings: Any) -> EncoderConfig:
    """The backbone that all released students share."""
    stack = ((128, 10, 5), (256, 1, 1), *((256, 3, 2),) * 4, (width, 1, 1), *((width, 2, 2),) * 2)
    return EncoderConfig(
        **{
            "conv_layers": stack,
            "width": width,
            "layers": 12,
            "heads": 12,
            "ffn": ffn,
            "pattern": "2by6",
            "projection_width": 768,
            "scale_layer_gradients": True,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
            "input_dropout": 0.05,
            **settings,
        }
    )


def armhubert() -> EncoderConfig:
    """ARMHuBERT: 26,448,448 parameters with heads for a 768-wide teacher, 22,015,552 without."""
    return _arm(480, 864)


def armhubert_s() -> EncoderConfig:
    """ARMHuBERT-S and ARMwavLM-S: 22,394,080 parameters with heads, 18,403,552 without."""
    return _arm(432, 816)


def maskhubert() -> EncoderConfig:
    """MaskHuBERT, no map reused: 26,635,840 parameters with heads, 22,202,944 without."""
    return _arm(480, 640, pattern="", scale_layer_gradients=False)


def mini() -> EncoderConfig:
    """A student for the bundled 5.6 M teacher, a quarter of its size; for demonstrations and tests on a CPU."""
    return EncoderConfig(
        conv_layers=((32, 10, 5), (48, 1, 1), *((48, 3, 2),) * 4, (160, 1, 1), *((160, 2, 2),) * 2),
        width=160,
        layers=6,
        heads=4,
        ffn=288,
        pattern="2by3",
        projection_width=256,
        scale_layer_gradients=True,
    )


PRESETS: dict[str, Callable[[], EncoderConfig]] = {
    "armhubert": armhubert,
    "armhubert-s": armhubert_s,
    "armwavlm-s": armhubert_s,
    "maskhubert": maskhubert,
    "mini": mini,
}


def preset(name: str) -> EncoderConfig:
    """The preset called `name`; an unknown name is an ArmhubertError that names the nearest."""
    if name not in PRESETS:
        raise ArmhubertError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]()
