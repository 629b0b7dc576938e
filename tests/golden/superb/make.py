"""Writes s3prl.safetensors beside it: losses and predictions of s3prl 0.4.18's own SUPERB modules on fixed inputs.

    pip install --no-deps s3prl==0.4.18 && python tests/golden/superb/make.py [--full]

s3prl does not import on torchaudio 2.11: what it misses and does not use here is stubbed. `--full` writes nothing, and
prints the differences at SUPERB's sizes (D 768, LSTMs of 1024).
"""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import torch
import torchaudio


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_s3prl(*names: str) -> list[Any]:
    """Modules of s3prl, with whatever else they import stubbed where it is not installed."""
    torchaudio.set_audio_backend = lambda *_: None
    sys.modules["torchaudio.sox_effects"] = torchaudio.sox_effects = _Stub("torchaudio.sox_effects")
    for owner, missing in ((huggingface_hub, ("HfFolder", "Repository")), (torchaudio, ("info", "load"))):
        for name in missing:
            if not hasattr(owner, name):
                setattr(owner, name, type(name, (), {}))
    while True:
        try:
            return [importlib.import_module(f"s3prl.{name}") for name in names]
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("s3prl"):
                raise
            sys.modules[error.name] = _Stub(error.name)
            for loaded in [name for name in sys.modules if name.startswith("s3prl")]:
                del sys.modules[loaded]


PHONES = ["AA", "AE", "AH", "B", "CH", "D", "EH", "F", "IY", "K", "L", "M", "N", "S", "T"]
TEXTS = ["HELLO WORLD", "A CAT", "IT'S"]
PHONE_TEXTS = ["HH AH L OW".replace("HH", "T").replace("OW", "AA"), "K AE T", "S IY M AE N"]
CLASSES = ["go", "left", "no", "yes"]
LABELS = ["yes", "go", "left"]


def make(width: int, size: int, layers: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Inputs, s3prl's weights and what s3prl's tasks say of them."""
    linear, rnn, augment, upstream, ctc, classify, tokenizer, category = import_s3prl(
        "nn.linear", "nn.rnn", "nn.specaug", "nn.upstream", "task.speech2text_ctc_task",
        "task.utterance_classification_task", "dataio.encoder.tokenizer", "dataio.encoder.category",
    )  # fmt: skip
    import numpy as np

    torch.manual_seed(0)
    lengths = torch.tensor([60, 41, 23])
    hidden = torch.randn(layers, 3, 60, width) * (torch.arange(60) < lengths[:, None])[..., None]
    fake = types.SimpleNamespace(hidden_sizes=[width] * layers, downsample_rates=[320] * layers, num_layers=layers)
    featurizer = upstream.Featurizer(fake)
    featurizer.weights.data = torch.randn(layers)
    features, _ = featurizer(list(hidden), [lengths] * layers)
    features = features.detach()
    tensors = {"hidden": hidden, "layer_weights": featurizer.weights.detach(), "features": features, "lengths": lengths}
    said: dict[str, Any] = {}

    def keep(name: str, module: torch.nn.Module) -> None:
        tensors.update({f"{name}.{key}": value.clone() for key, value in module.state_dict().items()})

    phones = tokenizer.load_tokenizer("phoneme", vocab_list=PHONES)
    characters = tokenizer.load_tokenizer("character", vocab_list=sorted(set("".join(TEXTS))))
    heads = {
        "pr": (linear.FrameLevelLinear(width, phones.vocab_size), phones, PHONE_TEXTS, ["per"]),
        "asr": (
            rnn.RNNEncoder(
                width, characters.vocab_size, module="LSTM", proj_size=size, hidden_size=[size, size],
                dropout=[0.2, 0.2], layer_norm=[False, False], proj=[False, False], sample_rate=[1, 1],
                sample_style="concat", bidirectional=True,
            ),
            characters,
            TEXTS,
            ["cer", "wer"],
        ),
    }  # fmt: skip
    for name, (head, encoder, texts, metrics) in heads.items():
        task = ctc.Speech2TextCTCTask(head, encoder, log_metrics=metrics).eval()
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(encoder.encode(t)) for t in texts], batch_first=True)
        loss, cacheable = task(
            "test", features, lengths, np.array(texts, dtype="object"), ids, np.array(["a", "b", "c"])
        )
        keep(name, head)
        tensors[f"{name}.logits"] = head(features, lengths)[0].detach()
        said[name] = {"loss": loss.item(), "predictions": cacheable["prediction"]}
    head = linear.MeanPoolingLinear(width, len(CLASSES))
    task = classify.UtteranceClassificationTask(head, category.CategoryEncoder(CLASSES)).eval()
    ids = torch.tensor([CLASSES.index(label) for label in LABELS])
    loss, cacheable = task("test", features, lengths, ids, LABELS, ["a", "b", "c"])
    keep("ks", head)
    said["ks"] = {"loss": loss.item(), "predictions": cacheable["prediction"]}
    spec = augment.SpecAug(
        freq_mask_width_range=(0, 50), num_freq_mask=4, time_mask_width_range=(0, 40), num_time_mask=2
    )
    torch.manual_seed(1)
    tensors["augmented"] = spec(features.clone(), lengths)[0]
    return tensors, said


if __name__ == "__main__":
    if "--full" in sys.argv:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from superb.test_s3prl import differences

        for name, value in differences(*make(768, 1024, layers=13)).items():
            print(f"{name}: {value:.3g}")
    else:
        tensors, said = make(12, 8)
        path = Path(__file__).with_name("s3prl.safetensors")
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        safetensors.torch.save_file(contiguous, path, metadata={"said": json.dumps(said), "s3prl": "0.4.18"})
        print(f"{path}: {path.stat().st_size} bytes")
