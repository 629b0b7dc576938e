"""Other people's weights -> a folder of ours, written whole and read back."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from armhubert.config import AttentionMode, EncoderConfig
from armhubert.convert import load_weights
from armhubert.errors import ArmhubertError
from armhubert.files import umask
from armhubert.student import ARMHuBERT, ParameterCount, count_parameters, model_card, training_section


class Converted(NamedTuple):
    """What became of a source's tensors; a tensor that is missing is an error instead."""

    source: str
    out: Path
    config: EncoderConfig
    parameters: ParameterCount
    mapped: tuple[str, ...]
    """Our names of the tensors written."""
    ignored: tuple[str, ...]
    """The source's names of what has no place in an encoder."""
    inferred: tuple[str, ...]
    """`name=value` of settings that the source does not state."""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    attention_mode: AttentionMode | None = None,
    heads: bool = True,
    force: bool = False,
) -> Converted:
    """Write `source` as a folder that `ARMHuBERT.from_pretrained` and `load_teacher` read, and read it back.

    A new folder is written under a temporary name beside `out` and renamed when it is complete and checked. Where `out`
    exists, empty or not (`force`), the temporary folder lies in it; its files, complete and checked, then replace those
    of the same names one by one, config.json last, and no other file is touched.

    Args:
        source: as for `armhubert.convert.load_weights`.
        out: the folder; it must not exist, be empty, or come with `force`.
        attention_mode: read the maps in another way than recorded; None: as recorded.
        heads: keep the distillation heads, if there are any.
        force: replace our files in a folder that holds something.

    Raises:
        ArmhubertError: nothing usable at `source`, `out` is taken or cannot be written; `out` is as it was, unless one
            of the last moves failed.
    """
    folder = Path(out)
    exists = os.path.exists(folder)  # False, unlike Path's, for names that no file system takes
    if exists and not folder.is_dir():
        raise ArmhubertError(f"{folder} is a file: give a folder")
    if exists and os.path.exists(source) and folder.samefile(source):
        raise ArmhubertError(f"{folder} is the source itself: give another folder")
    if exists and any(folder.iterdir()) and not force:
        raise ArmhubertError(
            f"{folder} is not empty: choose another folder, or replace our files in it with force=True"
        )
    recorded = load_weights(source)
    weights = recorded.chosen(heads=heads, attention_mode=attention_mode)
    model = ARMHuBERT.from_weights(weights)
    told = ""
    if weights.inferred:
        told = (
            "\nSettings that the source does not state, taken from published models of this size: "
            f"{', '.join(weights.inferred)}.\n"
        )
    # not weights.source: of a hub id that is a folder in the cache, named by a commit
    name: str | None = os.path.basename(os.path.abspath(source)) if os.path.exists(source) else str(source)
    if training := training_section(_card(Path(weights.source))):  # a student of ours in another form
        told, name = training, None
        if weights.config.attention_mode != recorded.config.attention_mode:
            told += f"\nIts maps were read as `{recorded.config.attention_mode}` in that training.\n"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # inside, as an existing folder may be a mount point, a link or the current one, which no rename replaces
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder if exists else folder.parent))
    except OSError as error:
        raise ArmhubertError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
    try:
        # mkdtemp's folders are private; a model is not
        temporary.chmod(0o777 & ~umask())
        model.save_pretrained(temporary, card=model_card(model, told, converted=name))
        _check(temporary, model)
        if exists:
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, folder / file.name)
        else:
            os.replace(temporary, folder)
    except OSError as error:
        raise ArmhubertError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Converted(
        weights.source,
        folder,
        weights.config,
        count_parameters(model),
        tuple(weights.state),
        weights.ignored,
        weights.inferred,
    )


def _card(folder: Path) -> str:
    try:
        return (folder / "README.md").read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _check(folder: Path, model: ARMHuBERT) -> None:
    again, written = load_weights(folder), model.state_dict()
    same = again.config == model.config and again.state.keys() == written.keys()
    if not same or not all(torch.equal(again.state[name], value) for name, value in written.items()):
        raise RuntimeError("a model did not read back as it was written: memory or the disk is at fault")
