"""ARMHuBERT, the student: an encoder that reuses attention maps, with the heads it is distilled through."""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from typing_extensions import Self

from armhubert.config import SAMPLE_RATE, AttentionMode, EncoderConfig
from armhubert.convert import load_weights
from armhubert.encoder import EncoderOutput, SpeechEncoder, scale_gradient
from armhubert.errors import ArmhubertError, brief
from armhubert.files import write_atomic
from armhubert.kernels import Impl, linear

_PREPROCESSOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "sampling_rate": SAMPLE_RATE,
    "padding_value": 0.0,
    "do_normalize": False,  # the model does, where its configuration says so
    "return_attention_mask": True,
}


class LayerHeads(nn.Module):
    """One linear map D -> D_t a layer, kept as one tensor for all layers: weight [L, D_t, D], bias [L, D_t]."""

    def __init__(self, layers: int, width: int, projection_width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(layers, projection_width, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(layers, projection_width).uniform_(-bound, bound))

    def forward(self, hidden_states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """L tensors [B, T, D] -> L tensors [B, T, D_t]."""
        return tuple(
            linear(x, weight, bias) for x, weight, bias in zip(hidden_states, self.weight, self.bias, strict=True)
        )


class ARMHuBERT(SpeechEncoder):
    """A student: a speech encoder whose layers may reuse attention maps, with the heads it is distilled through.

    `ARMHuBERT.from_pretrained("runs/demo")` loads one, `ARMHuBERT(preset("armhubert"))` makes an untrained one.

    Args:
        config: the architecture; it has heads where `projection_width` is set.
        impl: implementation of attention and waveform convolutions: `auto` (Triton on a GPU, PyTorch elsewhere),
            `triton` or `torch`.
    """

    def __init__(self, config: EncoderConfig, *, impl: Impl = "auto") -> None:
        super().__init__(config, impl=impl)
        width = config.projection_width
        self.heads = None if width is None else LayerHeads(config.layers, config.width, width)

    def head_inputs(self, hidden_states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The layer outputs that enter the heads: hidden_states[1:], gradients scaled as the configuration says."""
        outputs = hidden_states[1:]
        if not self.config.scale_layer_gradients:
            return outputs
        return tuple(scale_gradient(x, 1 - self._stream_factor(i)) for i, x in enumerate(outputs))

    def forward(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        hidden_states: bool = True,
        projections: bool = True,
        attentions: bool = False,
    ) -> EncoderOutput:
        """Features of a batch of waveforms.

        Args:
            waveforms: [B, S] at 16 kHz, float.
            lengths: valid samples of each utterance [B], integer; None: all S.
            mask: [B, T] bool, frames to replace by the mask embedding; None: none.
            hidden_states: False leaves them out of the output, which takes less memory.
            projections: False leaves the heads out.
            attentions: True adds each layer's map, which takes memory for B h T^2 numbers a layer.

        Returns:
            The features; those of padded frames are unspecified. Gradients are plain, also through the heads: the
            scaling of distillation is `armhubert.losses.Objective`'s.

        Raises:
            ArmhubertError: shapes or lengths that do not fit.
        """
        heads = self.heads if projections else None
        output = super().forward(
            waveforms, lengths, mask, hidden_states=hidden_states or heads is not None, attentions=attentions
        )
        if heads is None:
            return output
        projected = heads(output.hidden_states[1:])
        return output._replace(projections=projected, hidden_states=output.hidden_states if hidden_states else ())

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        heads: bool = True,
        attention_mode: AttentionMode | None = None,
        dropout: float | None = None,
        attention_dropout: float | None = None,
        activation_dropout: float | None = None,
        input_dropout: float | None = None,
        impl: Impl = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """A student in eval mode, from whatever holds one.

        Args:
            source: a folder of `save_pretrained` or `armhubert distill`, a hub id, a released `student.ckpt` with its
                `.yaml` beside it, or any source that `load_teacher` takes (a student that reuses nothing).
            heads: keep the distillation heads, if there are any; without them the model is smaller and faster.
            attention_mode: how reusing layers read the map, `exact` or `resoftmax`, instead of as recorded.
            dropout, attention_dropout, activation_dropout, input_dropout: probabilities to train on with, as
                `EncoderConfig` names them, instead of those recorded; they act after `.train()`.
            impl: implementation of attention and waveform convolutions: `auto`, `triton` or `torch`.
            dtype: of the parameters.
            device: of the parameters.

        Raises:
            ArmhubertError: nothing usable at `source`, the message says what is missing; no such probability.

        Warns:
            UserWarning: a model that was trained with `resoftmax` is read as `exact`.
        """
        weights = load_weights(source).chosen(heads=heads, attention_mode=attention_mode)
        dropouts = {
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "activation_dropout": activation_dropout,
            "input_dropout": input_dropout,
        }
        weights = weights.with_config(**{name: value for name, value in dropouts.items() if value is not None})
        return cls.from_weights(weights, impl=impl, dtype=dtype, device=device)

    def save_pretrained(self, path: str | Path, *, card: str | None = None) -> None:
        """Write config.json, preprocessor_config.json (transformers' feature extractor), model.safetensors (in the
        parameters' dtype) and a model card, README.md, each atomically. A README.md that is there stays where `card`
        is None.

        Raises:
            ArmhubertError: the model's tensors are no longer those of its configuration, or the folder cannot be
                written.
        """
        from armhubert import __version__

        self._check_saveable()
        folder = Path(path)
        config = {"model_type": "armhubert", "armhubert_version": __version__, **self.config.as_dict()}
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_atomic(folder / "model.safetensors", safetensors.torch.save(state, metadata={"format": "pt"}))
        write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
        write_atomic(folder / "preprocessor_config.json", json.dumps(_PREPROCESSOR, indent=2) + "\n")
        if card is not None or not (folder / "README.md").exists():
            write_atomic(folder / "README.md", card or model_card(self))

    def _check_saveable(self) -> None:
        with torch.device("meta"):
            try:
                model: nn.Module = type(self)(self.config)
            except TypeError:  # a class whose constructor takes more
                model = ARMHuBERT(self.config)
        expected = {name: value.shape for name, value in model.state_dict().items()}
        state = self.state_dict()
        if odd := sorted(expected.items() ^ {name: value.shape for name, value in state.items()}.items()):
            raise ArmhubertError(
                f"{odd[0][0]} is not in the model as its configuration has it, so nothing could load what is saved: "
                "make pruning permanent, load the tensors into a model of the configuration that is meant, or save its "
                "state_dict"
            )
        if empty := next((name for name, value in state.items() if value.is_meta), None):
            raise ArmhubertError(f"{empty} is on the meta device and has no values to save: load them first")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        private: bool | None = None,
        commit_message: str = "Upload an ARMHuBERT student",
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, creating the repository where needed.

        Args:
            repo_id: `name` or `organisation/name`.
            card: the model card; None: `model_card`. `armhubert distill` leaves a fuller one in its folder's README.md.
            private: whether a new repository is private; None: the account's default.
            commit_message: of the upload.
            revision: branch; None: the main one.
            create_pr: propose the upload as a pull request.
            token: None: the one that `hf auth login` or HF_TOKEN has set.

        Returns:
            Address of the commit.

        Raises:
            ArmhubertError: offline, no or a wrong token, or a repository that may not be written.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HFValidationError, HTTPError

        if constants.HF_HUB_OFFLINE:
            raise ArmhubertError(f"cannot upload to {repo_id!r}: HF_HUB_OFFLINE is set; unset it to reach the hub")
        self._check_saveable()
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            try:
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                self.save_pretrained(folder, card=card or model_card(self, source=repo_id))
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=revision,
                    create_pr=create_pr,
                )
            except (HTTPError, OSError, HFValidationError) as error:  # refused by the hub, no network, no such name
                reason = brief(error)
                raise ArmhubertError(
                    f"cannot upload to {repo_id!r}: {reason}; check the name, the network and the token (hf auth login)"
                ) from None
        return str(commit.commit_url)


class ParameterCount(NamedTuple):
    """Parameters of a student."""

    total: int
    without_heads: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count as the papers do: every parameter, and every one but the heads'."""
    heads = sum(p.numel() for name, p in model.named_parameters() if name.startswith("heads."))
    total = sum(p.numel() for p in model.parameters())
    return ParameterCount(total, total - heads)


def model_card(
    model: ARMHuBERT, training: str = "", source: str = "this-folder", *, converted: str | None = None
) -> str:
    """Markdown that a model folder carries: what the model is, how to load it from `source`, and `training`, how it
    came to be; `converted` is the name of somebody else's model that it was, None: it is a student of ours.
    """
    config, count = model.config, count_parameters(model)
    ours = converted is None
    heads = "" if model.heads is None else f", {count.without_heads:,} without the distillation heads"
    licence = "" if ours else "license: other\n"  # a student's is for its owner to say
    tags = ["speech", "self-supervised", *(["distillation"] if ours and training else []), "feature-extraction"]
    return f"""---
library_name: armhubert
{licence}tags: [{", ".join(tags)}]
---
# {"ARMHuBERT student" if ours else f"{converted}, converted"}

{config.layers} layers, {config.sizes}; reuse pattern `{config.pattern}`, maps read as \
`{config.attention_mode}`; {count.total:,} parameters{heads}. Input: 16 kHz mono{
        ", normalised to zero mean and unit variance by the model" if config.normalize_input else ""
    }; one frame every {config.hop} samples.

```python
from armhubert import ARMHuBERT

model = ARMHuBERT.from_pretrained("{source}", heads=False)
features = model(waveforms).last_hidden_state  # [B, T, {config.width}]
```

In transformers, after `import armhubert.huggingface`: `AutoModel.from_pretrained("{source}")`.
{training}
{_METHOD if ours else _CONVERTED}
"""


def training_section(card: str) -> str:
    """What the card of one of our students tells of its training, for the card of another form of it; else "".

    Without the files that lie beside it.
    """
    if "\n# ARMHuBERT student\n" not in card:
        return ""
    _, heading, rest = card.partition("\n## Training\n")
    return heading + rest.partition("\nMethod: ")[0].partition("\nAll settings: ")[0]


_CONVERTED = "The weights are the source's, under its licence and conditions."
_METHOD = """\
Method: Jang et al., *Recycle-and-Distill: Universal Compression Strategy for Transformer-based Speech SSL Models with
Attention Map Reusing and Masking Distillation*, Interspeech 2023 (arXiv 2305.11685)."""
