"""Weights on their way into a model: a configuration and the tensors that belong to it, under our names."""

import dataclasses
import warnings
from typing import Any, NamedTuple

from torch import Tensor

from armhubert.config import AttentionMode, EncoderConfig


class Weights(NamedTuple):
    """What every converter returns."""

    config: EncoderConfig
    state: dict[str, Tensor]
    """Tensors by the names of `SpeechEncoder.state_dict()` or `ARMHuBERT.state_dict()`."""
    source: str
    """Where they came from, for messages."""
    ignored: tuple[str, ...] = ()
    """Names in the source that have no place in an encoder: quantisers, CTC heads, optimiser state."""
    inferred: tuple[str, ...] = ()
    """`name=value` of settings that the source does not state: those of the published models of that size."""

    def with_config(self, **changes: Any) -> "Weights":
        """The same tensors under a changed configuration."""
        return self._replace(config=dataclasses.replace(self.config, **changes))

    def _read_as(self, mode: AttentionMode) -> "Weights":
        if mode == "exact" and self.config.attention_mode == "resoftmax" and "R" in self.config.pattern:
            warnings.warn(
                f"{self.source} was trained with maps that pass through the softmax twice (resoftmax), close to mean "
                "pooling in reusing layers; read as exact, its features are others than the published ones: "
                "fine-tune it before you use them",
                stacklevel=4,
            )
        return self.with_config(attention_mode=mode)

    def chosen(self, *, heads: bool, attention_mode: AttentionMode | None) -> "Weights":
        """What a user asks for of them: without the heads unless `heads`; maps read as `attention_mode`, None: as
        recorded.

        Warns:
            UserWarning: the maps were read through a second softmax in training, and `exact` leaves it out.
        """
        weights = self if attention_mode is None else self._read_as(attention_mode)
        return weights if heads else weights.without_heads()

    def without_heads(self) -> "Weights":
        """Without the distillation heads, if there are any."""
        state = {name: value for name, value in self.state.items() if not name.startswith("heads.")}
        return self._replace(state=state).with_config(projection_width=None)
