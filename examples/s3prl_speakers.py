"""SUPERB's speaker identification in s3prl, with a student as the upstream, on speech in LibriSpeech's layout.

    python examples/s3prl_speakers.py runs/demo /data/LibriSpeech runs/sid --steps 200

s3prl's own recipe trains; what changes in a configuration for HuBERT is marked. The data are LibriSpeech's folders in
place of VoxCeleb, the first utterance of each speaker held out, so that the script can be tried on little. Needs s3prl:
`pip install s3prl==0.4.18`.
"""

import argparse
import csv
from pathlib import Path

import s3prl_shim  # noqa: F401 - s3prl 0.4.18 beside torchaudio 2.11
from s3prl.problem import SuperbSID

import armhubert.s3prl

armhubert.s3prl.register()  # added: s3prl now knows "armhubert_local"


class LibriSpeechSpeakers(SuperbSID):
    """Speakers are folder names."""

    def prepare_data(
        self, prepare_data: dict[str, str], target_dir: str, cache_dir: str, get_path_only: bool = False
    ) -> tuple[str, str, list[str]]:
        """Write s3prl's tables: id, wav_path, label."""
        rows: dict[bool, list[tuple[str, str, str]]] = {True: [], False: []}
        seen = set()
        for path in sorted(Path(prepare_data["dataset_root"]).rglob("*-*-*.*")):
            if path.suffix in (".flac", ".opus"):
                speaker = path.stem.split("-")[0]
                rows[speaker not in seen].append((path.stem, str(path), speaker))
                seen.add(speaker)
        for name, held_out in (("train", False), ("test", True)):
            with open(Path(target_dir) / f"{name}.csv", "w", newline="") as file:
                csv.writer(file).writerows([("id", "wav_path", "label"), *rows[held_out]])
        train, test = (str(Path(target_dir) / f"{name}.csv") for name in ("train", "test"))
        return train, test, [test]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a student's folder, or a released student.ckpt")
    parser.add_argument("data", help="speech in LibriSpeech's layout")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    problem = LibriSpeechSpeakers()
    config = problem.default_config()
    # before: config["build_upstream"] = {"name": "hubert"}
    config["build_upstream"] = {"name": armhubert.s3prl.NAME, "path_or_url": args.model}
    config["prepare_data"] = {"dataset_root": args.data}
    config["target_dir"] = args.out
    config["train"].update(total_steps=args.steps, eval_step=args.steps, save_step=args.steps, log_step=10)
    problem.run(**config, device=args.device, num_workers=0)
