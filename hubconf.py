"""torch.hub entry point: `torch.hub.load(FOLDER, "armhubert_local", source="local", ckpt="runs/demo")`.

FOLDER is this repository. The package must be installed too (`pip install .`), since its kernels lie in a folder of
their own; what comes back is the upstream of `armhubert.s3prl`.
"""

dependencies = ["torch", "armhubert.kernels"]

from armhubert.s3prl import UpstreamExpert as armhubert_local  # noqa: E402, F401
