"""Students in transformers: `import armhubert.huggingface`, and the Auto classes know them.

    import armhubert.huggingface                                  # the one line that a script gains
    model = AutoModel.from_pretrained("runs/demo")                # a folder of ARMHuBERT.save_pretrained or distill
    extractor = AutoFeatureExtractor.from_pretrained("runs/demo")

Inputs, outputs and options are those of transformers' HubertModel, HubertForCTC and HubertForSequenceClassification, so
that a script for one runs with the other. Folders go both ways: what transformers' `save_pretrained` writes,
`ARMHuBERT.from_pretrained` reads.

Where HuBERT differs: features do not depend on padding, layers are never dropped (`layerdrop` must be 0), attention
maps are returned whatever the implementation and before dropout, and parts of the model have names of their own.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from armhubert.config import EncoderConfig, armhubert
from armhubert.errors import ArmhubertError
from armhubert.kernels import Impl
from armhubert.kernels.runtime import frame_mask, tracing
from armhubert.settings import build
from armhubert.student import ARMHuBERT

try:
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForAudioClassification,
        AutoModelForCTC,
        PreTrainedConfig,
        PreTrainedModel,
        Wav2Vec2FeatureExtractor,
        initialization,
    )
    from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices
except ImportError as error:
    raise ImportError(
        f"armhubert.huggingface needs transformers 5 ({error}): pip install 'armhubert[transformers]'"
    ) from error

__all__ = [
    "ARMHuBERTConfig",
    "ARMHuBERTForCTC",
    "ARMHuBERTForSequenceClassification",
    "ARMHuBERTModel",
    "ARMHuBERTPreTrainedModel",
]


class ARMHuBERTConfig(PreTrainedConfig):
    """`EncoderConfig`'s fields by their names, and HubertConfig's settings for fine-tuning by theirs.

    HuBERT's names for the encoder's fields (`hidden_size`, `num_hidden_layers`, `hidden_dropout`, ...) work as well.
    What is not given has the value of the `armhubert` preset.
    """

    model_type = "armhubert"
    attribute_map = {  # noqa: RUF012 - transformers' own declaration
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn",
        "hidden_dropout": "dropout",
        "feat_proj_dropout": "input_dropout",
        "layer_norm_eps": "norm_eps",
        "num_conv_pos_embeddings": "position_kernel",
        "num_conv_pos_embedding_groups": "position_groups",
        "feat_extract_norm": "conv_norm",
        "do_stable_layer_norm": "norm_first",
    }

    def __init__(
        self,
        *,
        apply_spec_augment: bool = True,
        mask_time_prob: float = 0.05,
        mask_time_length: int = 10,
        mask_time_min_masks: int = 2,
        mask_feature_prob: float = 0.0,
        mask_feature_length: int = 10,
        mask_feature_min_masks: int = 0,
        layerdrop: float = 0.0,
        final_dropout: float = 0.1,
        vocab_size: int = 32,
        ctc_loss_reduction: str = "sum",
        ctc_zero_infinity: bool = False,
        use_weighted_layer_sum: bool = False,
        classifier_proj_size: int = 256,
        initializer_range: float = 0.02,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        **kwargs: Any,
    ) -> None:
        kind = kwargs.get("model_type", self.model_type)
        if kind not in {getattr(base, "model_type", None) for base in type(self).__mro__}:
            raise ArmhubertError(
                f"a {kind} is no {self.model_type}: load it with transformers' own class, or make it one by armhubert "
                "convert"
            )
        stack = [kwargs.pop(name, None) for name in ("conv_dim", "conv_kernel", "conv_stride")]
        if any(stack):
            if not all(stack) or len({len(part) for part in stack}) > 1:
                raise ArmhubertError(
                    f"conv_dim, conv_kernel and conv_stride must come together and be of one length, got {stack}"
                )
            kwargs["conv_layers"] = tuple(zip(*stack, strict=True))
        for name, default in dataclasses.asdict(armhubert()).items():
            setattr(self, name, kwargs.pop(name, default))
        self.apply_spec_augment = apply_spec_augment
        self.mask_time_prob = mask_time_prob
        self.mask_time_length = mask_time_length
        self.mask_time_min_masks = mask_time_min_masks
        self.mask_feature_prob = mask_feature_prob
        self.mask_feature_length = mask_feature_length
        self.mask_feature_min_masks = mask_feature_min_masks
        self.layerdrop = layerdrop
        self.final_dropout = final_dropout
        self.vocab_size = vocab_size
        self.ctc_loss_reduction = ctc_loss_reduction
        self.ctc_zero_infinity = ctc_zero_infinity
        self.use_weighted_layer_sum = use_weighted_layer_sum
        self.classifier_proj_size = classifier_proj_size
        self.initializer_range = initializer_range
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        super().__init__(**kwargs)

    @property
    def encoder(self) -> EncoderConfig:
        """The encoder that this describes.

        Raises:
            ArmhubertError: a setting breaks a rule of `EncoderConfig`, or `layerdrop` is not 0.
        """
        if self.layerdrop:
            raise ArmhubertError(
                f"layerdrop must be 0, got {self.layerdrop}: a dropped layer would take its attention map with it"
            )
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(EncoderConfig)}
        return build(EncoderConfig, fields, type(self).__name__)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples a frame; transformers' pipelines cut long audio by it."""
        return self.encoder.hop

    @property
    def conv_dim(self) -> tuple[int, ...]:
        """Channels of the waveform convolutions."""
        return tuple(channels for channels, _, _ in self.conv_layers)

    @property
    def conv_kernel(self) -> tuple[int, ...]:
        """Kernel of each waveform convolution."""
        return tuple(kernel for _, kernel, _ in self.conv_layers)

    @property
    def conv_stride(self) -> tuple[int, ...]:
        """Stride of each waveform convolution."""
        return tuple(stride for _, _, stride in self.conv_layers)


class ARMHuBERTPreTrainedModel(PreTrainedModel):
    """What the models share: the student `self.armhubert`, its loading, and the way through it.

    `attn_implementation`: `sdpa` (default) runs the project's attention ops, Triton on a GPU and PyTorch elsewhere;
    `eager` their PyTorch twins everywhere.
    """

    config_class = ARMHuBERTConfig
    base_model_prefix = "armhubert"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # modules that read the weights of their children, which must therefore be on one device
    _no_split_modules = ["EncoderLayer", "ChannelNormConv", "PositionalConv"]  # noqa: RUF012
    # distillation heads, and those of another task
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"(^|\.)heads\.",
        r"^(lm_head|projector|classifier)\.",
        r"^layer_weights$",
    ]

    def __init__(self, config: ARMHuBERTConfig) -> None:
        super().__init__(config)
        self.armhubert = ARMHuBERT(self.config.encoder, impl=self._impl())
        self._freeze_heads()

    def _freeze_heads(self) -> None:
        """Train no distillation heads: DistributedDataParallel would wait for gradients that they never get."""
        if self.armhubert.heads is not None:
            self.armhubert.heads.requires_grad_(False)

    def _impl(self) -> Impl:
        return "torch" if self.config._attn_implementation == "eager" else "auto"

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As transformers': `sdpa` or `eager`, from the next call on."""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.armhubert.modules():
            if hasattr(module, "impl"):
                module.impl = self._impl()  # type: ignore[assignment]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but an encoder that lacks tensors is an error, not a warning with random weights.

        Raises:
            ArmhubertError: tensors of the encoder are missing.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        encoders = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ARMHuBERT))
        if others := [name for name in encoders if name != "armhubert."]:
            raise ArmhubertError(
                f"{cls.__name__} has an encoder at {others[0][:-1]} beside the one that its base class makes: use "
                "self.armhubert, and assign no other"
            )
        if missing := sorted(name for name in info["missing_keys"] if name.startswith(encoders)):
            raise ArmhubertError(
                f"{model.name_or_path} lacks {len(missing)} tensors of its encoder, such as {missing[0]}: its weights "
                "do not fit its configuration"
            )
        model._freeze_heads()  # loading puts new parameters in their places
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        # the student has drawn its own, and may lack none when it is loaded; the rest is a head, ours or a user's
        if not any(module is part for part in self.armhubert.modules()):
            super()._init_weights(module)

    def freeze_feature_encoder(self) -> None:
        """Train nothing in the waveform convolutions, the usual setting of fine-tuning."""
        self.armhubert.front_end.requires_grad_(False)

    def _get_feat_extract_output_lengths(self, input_lengths: Any) -> Any:
        """Frames of so many samples, an int or a tensor."""
        return self.armhubert.config.frames(input_lengths)

    def _get_feature_vector_attention_mask(self, feature_vector_length: int, attention_mask: Tensor) -> Tensor:
        """Sample-level mask [B, S] -> which of so many frames are valid [B, T], bool: for pooling over time."""
        return frame_mask(self._get_feat_extract_output_lengths(attention_mask.sum(-1).long()), feature_vector_length)

    def _encode(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None,
        mask_time_indices: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> BaseModelOutput:
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        model = self.armhubert
        lengths = None if attention_mask is None else _lengths(attention_mask, input_values)
        if not self.training and mask_time_indices is None:
            output = model(
                input_values,
                lengths,
                hidden_states=bool(output_hidden_states),
                projections=False,
                attentions=bool(output_attentions),
            )
            return BaseModelOutput(
                last_hidden_state=output.last_hidden_state,
                hidden_states=output.hidden_states or None,
                attentions=output.attentions or None,
            )
        model.check_inputs(input_values, lengths)
        x, frames = model.embed(input_values, lengths)
        x, mask = self._spec_augment(x, frames, mask_time_indices)
        last = model.layer_inputs(x, frames, mask)
        hidden_states = [last]
        attentions: list[Any] | None = [] if output_attentions else None
        for last in model.layer_outputs(hidden_states[0], frames, attentions=attentions):
            if output_hidden_states:
                hidden_states.append(last)
        return BaseModelOutput(
            last_hidden_state=model.norm(last) if model.config.norm_first else last,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if attentions is not None else None,
        )

    def _spec_augment(
        self, x: Tensor, frames: Tensor | None, mask_time_indices: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """SpecAugment as HuBERT's, in training only: [B, T, D] with features zeroed, mask [B, T] of frames or None.

        Masked frames receive the mask embedding whole. Given `mask_time_indices` are always taken.
        """
        config, (batch, size, width) = self.config, x.shape
        augment = self.training and config.apply_spec_augment
        if augment and config.mask_feature_prob > 0:
            zeroed = _compute_mask_indices(
                (batch, width),
                config.mask_feature_prob,
                config.mask_feature_length,
                min_masks=config.mask_feature_min_masks,
            )
            x = x.masked_fill(torch.from_numpy(zeroed).to(x.device)[:, None], 0)
        if mask_time_indices is not None:
            mask = mask_time_indices.to(x.device, torch.bool)
            if mask.shape != (batch, size):
                raise ArmhubertError(f"mask_time_indices must be [{batch}, {size}], got {list(mask.shape)}")
            return x, mask
        if not augment or config.mask_time_prob <= 0 or self.armhubert.mask_embedding is None:
            return x, None
        valid: Any = None if frames is None else frame_mask(frames, size).long()
        drawn = _compute_mask_indices(
            (batch, size),
            config.mask_time_prob,
            config.mask_time_length,
            attention_mask=valid,
            min_masks=config.mask_time_min_masks,
        )
        return x, torch.from_numpy(drawn).to(x.device)


class ARMHuBERTModel(ARMHuBERTPreTrainedModel):
    """A student as `AutoModel`. Distillation heads are kept and saved, not run or trained; with `projection_width=None`
    they are left out."""

    def __init__(self, config: ARMHuBERTConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Features of a batch, as HubertModel gives them.

        Args:
            input_values: waveforms [B, S] at 16 kHz.
            attention_mask: [B, S], 1 on samples and 0 on padding, which must come last; None: no padding.
            mask_time_indices: [B, T], frames to replace by the mask embedding; in training, None draws them
                (SpecAugment, `mask_time_prob`).
            output_attentions: return the map that each layer applies, L tensors [B, H, T, T].
            output_hidden_states: return the input of layer 0 and every layer's output, L + 1 tensors [B, T, D].
            return_dict: False gives a tuple.

        Raises:
            ArmhubertError: shapes, lengths or options that do not fit.
        """
        output = self._encode(input_values, attention_mask, mask_time_indices, output_attentions, output_hidden_states)
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


class _Task(ARMHuBERTPreTrainedModel):
    """A student without distillation heads under the head of a task."""

    def __init__(self, config: ARMHuBERTConfig) -> None:
        config = copy.deepcopy(config)
        config.projection_width = None
        super().__init__(config)

    def freeze_base_model(self) -> None:
        """Train the task's head alone."""
        self.armhubert.requires_grad_(False)


class ARMHuBERTForCTC(_Task):
    """A student without distillation heads under a linear CTC head, as `AutoModelForCTC`."""

    def __init__(self, config: ARMHuBERTConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        mask_time_indices: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Logits [B, T, vocabulary] and, with labels, the CTC loss, as HubertForCTC gives them.

        Args:
            input_values: as in `ARMHuBERTModel`, like the options.
            attention_mask: likewise.
            labels: token ids [B, U]; negative ones (-100) and the blank (`pad_token_id`) are padding. The loss is
                reduced by `ctc_loss_reduction`; `ctc_zero_infinity` drops utterances too short for their labels.
            mask_time_indices: likewise.
            output_attentions: likewise.
            output_hidden_states: likewise.
            return_dict: likewise.

        Raises:
            ArmhubertError: labels beyond the vocabulary, or inputs that do not fit.
        """
        if labels is not None and labels.numel() and int(labels.max()) >= self.config.vocab_size:
            raise ArmhubertError(
                f"labels must be below vocab_size {self.config.vocab_size}, got {int(labels.max())}: load the model "
                "with vocab_size=len(tokenizer)"
            )
        features = self._encode(
            input_values, attention_mask, mask_time_indices, output_attentions, output_hidden_states
        )
        logits = self.lm_head(self.dropout(features.last_hidden_state))
        loss = None if labels is None else self._loss(logits, labels, input_values, attention_mask)
        output = CausalLMOutput(loss, logits, features.hidden_states, features.attentions)
        return output if _as_dict(self.config, return_dict) else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, input_values: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None:
            frames = torch.full((len(logits),), logits.shape[1], device=logits.device)
        else:
            frames = self._get_feat_extract_output_lengths(_lengths(attention_mask, input_values))
        labels = labels.to(logits.device)
        given = (labels >= 0) & (labels != self.config.pad_token_id)
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's takes 32-bit labels and no length of 0
            return nn.functional.ctc_loss(
                logits.log_softmax(-1, dtype=torch.float32).transpose(0, 1),
                labels.masked_select(given),
                frames,
                given.sum(-1),
                blank=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )


class ARMHuBERTForSequenceClassification(_Task):
    """A student without distillation heads under a classifier of utterances, as `AutoModelForAudioClassification`.

    Features of the last layer, or with `use_weighted_layer_sum` a learned average of all layers', are projected to
    `classifier_proj_size`, averaged over valid frames, and mapped to `num_labels`.
    """

    def __init__(self, config: ARMHuBERTConfig) -> None:
        super().__init__(config)
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.zeros(config.layers + 1))
        assert config.num_labels is not None  # 2 where nothing is said
        self.projector = nn.Linear(config.width, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.use_weighted_layer_sum:
            initialization.zeros_(self.layer_weights)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        mask_time_indices: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits [B, labels] and, with labels, the cross entropy, as HubertForSequenceClassification gives them.

        Args:
            input_values: as in `ARMHuBERTModel`, like the options.
            attention_mask: likewise.
            labels: the class of each utterance, [B] int64.
            mask_time_indices: likewise.
            output_attentions: likewise.
            output_hidden_states: likewise.
            return_dict: likewise.

        Raises:
            ArmhubertError: inputs that do not fit.
        """
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weighted = self.config.use_weighted_layer_sum
        features = self._encode(input_values, attention_mask, mask_time_indices, output_attentions, asked or weighted)
        x = features.last_hidden_state
        if weighted:
            assert features.hidden_states is not None
            x = torch.einsum("l,lbtd->btd", self.layer_weights.softmax(0), torch.stack(features.hidden_states))
        x = self.projector(x)
        if attention_mask is None:
            x = x.mean(1)
        else:
            valid = self._get_feature_vector_attention_mask(x.shape[1], attention_mask)
            x = x.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True)
        logits = self.classifier(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels.to(logits.device).flatten())
        hidden_states = features.hidden_states if asked else None
        output = SequenceClassifierOutput(loss, logits, hidden_states, features.attentions)
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


def _lengths(attention_mask: Tensor, input_values: Tensor) -> Tensor:
    """Sample-level mask [B, S] -> valid samples [B]."""
    if attention_mask.shape != input_values.shape:
        raise ArmhubertError(
            f"attention_mask must have the shape of input_values {list(input_values.shape)}, got "
            f"{list(attention_mask.shape)}"
        )
    lengths = attention_mask.sum(-1).long()
    # Reading values would stop a GPU's queue and a compiler's trace; on the CPU it is free.
    readable = attention_mask.device.type == "cpu" and not tracing()
    if readable and not torch.equal(frame_mask(lengths, attention_mask.shape[1]), attention_mask.bool()):
        raise ArmhubertError(
            "attention_mask must be 1 on an utterance and 0 on the padding after it, got padding elsewhere: pad right"
        )
    return lengths


def _as_dict(config: PreTrainedConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


AutoConfig.register("armhubert", ARMHuBERTConfig, exist_ok=True)
AutoFeatureExtractor.register(ARMHuBERTConfig, Wav2Vec2FeatureExtractor, exist_ok=True)
AutoModel.register(ARMHuBERTConfig, ARMHuBERTModel, exist_ok=True)
AutoModelForAudioClassification.register(ARMHuBERTConfig, ARMHuBERTForSequenceClassification, exist_ok=True)
AutoModelForCTC.register(ARMHuBERTConfig, ARMHuBERTForCTC, exist_ok=True)
