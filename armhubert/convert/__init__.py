"""Other people's weights -> ours. One module a format; each returns `Weights`, none builds a model."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from armhubert.bundled import TEACHER
from armhubert.convert import distilhubert, dphubert, fairseq, huggingface, native, released, torchaudio, wavlm
from armhubert.convert.pickles import read_pickle
from armhubert.convert.tensors import is_safetensors, read_file
from armhubert.errors import ArmhubertError
from armhubert.settings import read_mapping
from armhubert.weights import Weights

__all__ = ["is_source", "load_weights"]

BUNDLED = "mini"
_BESIDE_WEIGHTS = (".json", ".jsonl", ".md", ".png", ".tsv", ".txt")
"""Endings of what lies in a model's folder and is no checkpoint."""


class FileFormat(NamedTuple):
    """One kind of checkpoint file, told from the others by what it holds."""

    name: str
    recognise: Callable[[Mapping[str, Any]], bool]
    """Whether the file's top-level mapping is of this kind; looks, converts nothing, raises nothing."""
    load: Callable[[Mapping[str, Any], Path], Weights]
    """The mapping and where it was read -> weights."""


# The first that recognises a file reads it: the telling ones first, bare state dicts last.
FILE_FORMATS: tuple[FileFormat, ...] = (
    FileFormat("released student", released.recognise, released.load),
    FileFormat("s3prl DistilHuBERT", distilhubert.recognise, distilhubert.load),
    FileFormat("DPHuBERT", dphubert.recognise, dphubert.load),
    FileFormat("WavLM of Microsoft", wavlm.recognise, wavlm.load),
    FileFormat("fairseq checkpoint", fairseq.recognise, fairseq.load),
    FileFormat("s3prl conversion of one", fairseq.recognise_s3prl, fairseq.load_s3prl),
    FileFormat("torchaudio state dict", torchaudio.recognise, torchaudio.load_state),
)


def load_weights(source: str | Path) -> Weights:
    """Read an encoder's configuration and tensors; the format is recognised from the content.

    Args:
        source: `mini` (the bundled teacher); a folder with config.json and weights, ours or Hugging Face's (hubert,
            wav2vec2, wavlm); a checkpoint file: a released `student.ckpt` with its `.yaml` beside it, fairseq's `.pt`
            (HuBERT, wav2vec 2.0, fine-tuned for CTC or not) and s3prl's conversions, Microsoft's WavLM, DistilHuBERT,
            DPHuBERT, a torchaudio state dict (settings that its shapes do not tell in a `.yaml` beside it, where the
            sizes are of no published model); a torchaudio pipeline's name (HUBERT_BASE, ...); a hub id (org/name),
            downloaded and cached by huggingface_hub.

    Nothing in a file is imported, called or built: see `armhubert.convert.pickles`.

    Raises:
        ArmhubertError: nothing there, an unsupported architecture, or files that are damaged.
    """
    name, path = str(source), Path(source)
    if name == BUNDLED and not os.path.lexists(path):
        path = TEACHER
    if os.path.isdir(path):  # unlike Path's, these answer False for names that no file system takes
        return _from_folder(path)
    if os.path.isfile(path):
        return _from_file(path)
    if torchaudio.is_pipeline(name):
        return torchaudio.load(name)
    if _is_hub_id(name):
        return _from_folder(huggingface.download(name))
    raise ArmhubertError(
        f"no model at {name!r}, where no file or folder is: it must be 'mini', a folder with config.json, a checkpoint "
        "file, a torchaudio pipeline such as HUBERT_BASE, or a hub id such as facebook/hubert-base-ls960"
    )


def is_source(name: str) -> bool:
    """Whether `load_weights` has a file or folder to read, or a name to ask the network for."""
    return name == BUNDLED or os.path.exists(name) or torchaudio.is_pipeline(name) or _is_hub_id(name)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def _from_folder(folder: Path) -> Weights:
    if not (folder / "config.json").is_file():
        raise ArmhubertError(f"{folder} has no config.json: a model folder holds config.json and its weights")
    config = read_mapping(folder / "config.json")
    kind = config.get("model_type")
    if kind == "armhubert":
        return native.load(folder, config)
    return huggingface.load(folder, config)


def _from_file(path: Path) -> Weights:
    inside = (path.parent / "config.json").is_file()
    content: Any = None
    if not (inside and path.suffix in _BESIDE_WEIGHTS):
        content = read_file(path) if is_safetensors(path) else read_pickle(path, stand_ins=True)
    if isinstance(content, Mapping):
        for kind in FILE_FORMATS:
            if kind.recognise(content):
                return kind.load(content, path)
    if inside:
        raise ArmhubertError(f"{path} is a file of a model's folder, which has the config.json: give {path.parent}")
    raise ArmhubertError(
        f"{path} holds no model that is known here: it must be a {', '.join(kind.name for kind in FILE_FORMATS)}; "
        "of Hugging Face's weights give the folder, with config.json"
    )
