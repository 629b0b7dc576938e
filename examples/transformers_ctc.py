"""Fine-tune a HuBERT, or whatever AutoModel loads, to write letters: an ordinary transformers script.

    python examples/transformers_ctc.py facebook/hubert-base-ls960 /data/LibriSpeech
    python examples/transformers_ctc.py runs/demo /data/LibriSpeech      # a student; nothing else changes

Needs `pip install 'armhubert[transformers]'`. Prints the CTC loss of every pass over the data.
"""

import argparse
from pathlib import Path

import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModel

import armhubert.huggingface  # noqa: F401 - the one line that a script gains: AutoModel now loads students

LETTERS = " ABCDEFGHIJKLMNOPQRSTUVWXYZ'"  # numbered from 1; 0 is the blank

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder or hub id")
parser.add_argument("data", type=Path, help="speech in LibriSpeech's layout")
parser.add_argument("--seconds", type=float, default=60, help="of speech to train on")
parser.add_argument("--passes", type=int, default=10)
parser.add_argument("--batch", type=int, default=4, help="utterances")
args = parser.parse_args()
torch.manual_seed(0)

utterances: list[tuple[torch.Tensor, torch.Tensor]] = []
seconds = 0.0
for transcript in sorted(args.data.rglob("*.trans.txt")):
    for line in transcript.read_text().splitlines():
        name, text = line.split(" ", 1)
        path = next(transcript.parent.glob(f"{name}.*"), None)
        if path is None:
            raise SystemExit(f"{transcript} names {name}, which has no recording beside it")
        wave, rate = soundfile.read(path, dtype="float32")
        if seconds < args.seconds:
            utterances.append((torch.from_numpy(wave), torch.tensor([LETTERS.index(c) + 1 for c in text])))
            seconds += len(wave) / rate
if not utterances:
    raise SystemExit(f"no *.trans.txt in {args.data}: speech in LibriSpeech's layout is needed")

extractor = AutoFeatureExtractor.from_pretrained(args.model)
model = AutoModel.from_pretrained(args.model)
head = torch.nn.Linear(model.config.hidden_size, len(LETTERS) + 1)
optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)

model.train()
for number in range(args.passes):
    total = 0.0
    for start in range(0, len(utterances), args.batch):
        waves, texts = zip(*utterances[start : start + args.batch], strict=True)
        inputs = extractor(
            [wave.numpy() for wave in waves],
            sampling_rate=16_000,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        logits = head(model(**inputs).last_hidden_state)
        frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
        loss = torch.nn.functional.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), torch.cat(texts), frames, torch.tensor([len(t) for t in texts])
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(waves)
    print(f"pass {number + 1}: loss {total / len(utterances):.4f}", flush=True)
