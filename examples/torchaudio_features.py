"""Save one layer's features of every file in a folder: a torchaudio script, before and after.

python examples/torchaudio_features.py HUBERT_BASE /data/wavs features --layer 6
python examples/torchaudio_features.py runs/demo /data/wavs features --layer 6
"""

import argparse
from pathlib import Path

import soundfile
import torch
import torchaudio

from armhubert import ARMHuBERT
from armhubert.torchaudio import TorchaudioEncoder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a torchaudio pipeline, or a student's folder")
parser.add_argument("speech", type=Path, help="folder of audio at 16 kHz")
parser.add_argument("out", type=Path)
parser.add_argument("--layer", type=int, default=6, help="counted from 1; layers after it are not computed")
args = parser.parse_args()

if args.model.isupper():  # before
    model = getattr(torchaudio.pipelines, args.model).get_model()
else:  # after
    model = TorchaudioEncoder(ARMHuBERT.from_pretrained(args.model, heads=False))

args.out.mkdir(parents=True, exist_ok=True)
for path in sorted(p for p in args.speech.rglob("*") if p.suffix in (".wav", ".flac", ".opus")):
    wave, rate = soundfile.read(path, dtype="float32")
    assert rate == 16_000, f"{path} has {rate} Hz"
    with torch.inference_mode():
        features, _ = model.extract_features(torch.from_numpy(wave)[None], num_layers=args.layer)
    torch.save(features[-1][0], args.out / f"{path.stem}.pt")
    print(f"{path.stem}: {list(features[-1][0].shape)}")
