"""A student, or any encoder, behind the interface of torchaudio's Wav2Vec2Model.

A class of its own, since torchaudio's `forward` takes the same arguments as `SpeechEncoder.forward` and returns another
type: scripts written for a bundle's model change the line that builds it.
"""

from itertools import islice

from torch import Tensor, nn

from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError


class TorchaudioEncoder(nn.Module):
    """`extract_features` and `forward` of torchaudio's Wav2Vec2Model, over `model`, whose weights it shares."""

    def __init__(self, model: SpeechEncoder) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def extract_features(
        self, waveforms: Tensor, lengths: Tensor | None = None, num_layers: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Outputs of the Transformer layers, without the input of the first, and nothing computed past the last.

        Args:
            waveforms: [B, S] at 16 kHz.
            lengths: valid samples of each utterance [B]; None: all S.
            num_layers: stop after so many layers; None: all of them.

        Returns:
            `num_layers` tensors [B, T, D] (of pre-norm models before the final LayerNorm), and the valid frames of each
            utterance [B], None where `lengths` is.

        Raises:
            ArmhubertError: `num_layers` that the model does not have; shapes or lengths that do not fit.
        """
        depth = self.model.config.layers
        if num_layers is not None and not 1 <= num_layers <= depth:
            raise ArmhubertError(f"num_layers must be at least 1 and at most {depth}, got {num_layers}")
        if num_layers is None:  # on a CPU a batch of unequal lengths is then worked on in groups
            output = SpeechEncoder.forward(self.model, waveforms, lengths)
            return list(output.hidden_states[1:]), None if lengths is None else output.lengths.to(lengths.dtype)
        self.model.check_inputs(waveforms, lengths)
        x, frames = self.model.embed(waveforms, None if lengths is None else lengths.long())
        x = self.model.layer_inputs(x, frames, None)
        features = list(islice(self.model.layer_outputs(x, frames), num_layers))
        return features, None if frames is None or lengths is None else frames.to(lengths.dtype)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The last layer's output [B, T, D], of pre-norm models after the final LayerNorm, and valid frames or None."""
        features, frames = self.extract_features(waveforms, lengths)
        last = features[-1]
        return self.model.norm(last) if self.model.config.norm_first else last, frames
