#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under nine minutes: correctness of every kernel, times against
# baselines, the choice of variants, the student end to end. From a bare checkout; needs torch, triton, einops, rich,
# safetensors, huggingface_hub, pyyaml and (for one baseline) transformers. Without a GPU: a rehearsal on the CPU.
#
#   bench/gpu.sh                    all stages
#   bench/gpu.sh micro report       some of them
#
# OUT: where results go (bench/results); PYTHON: the interpreter (python3); LIMIT: seconds for everything (520).
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-$root/bench/results}
limit=${LIMIT:-520}
mkdir -p "$out" && out=$(cd "$out" && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}" >&2; exit 1; }

# The import names armhubert.kernels, .cli and .bench without an installation: a folder of links.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/armhubert"
for entry in "$root"/armhubert/* "$root/kernels" "$root/cli" "$root/bench"; do
    ln -s "$entry" "$package/armhubert/"
done
# many processes share the cores, and each would start a thread a core
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}
export PYTHONPATH="$package" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cd "$package" || exit 1

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
    options=(--device cuda)
else
    echo "=== no CUDA device: rehearsal, nothing here is a GPU figure ==="
    options=(--device cpu --quick)
fi

status=0
stage() { # name, seconds at most: what is left of the limit, with half a minute for the report, if that is less
    local left=$((limit - SECONDS - 30)) seconds=$2
    ((seconds > left)) && seconds=$left
    ((seconds < 10)) && { echo "=== $1: no time left ==="; return; }
    echo "=== $1, at most $seconds s, $SECONDS s in ==="
    timeout -k 5 $((seconds + 25)) "$python" -m armhubert.bench gpu "$1" "${options[@]}" --budget "$seconds" --out "$out" ||
        { status=$?; echo "=== $1 ended with $status ==="; }
}

for name in "${@:-check micro model variants tests report}"; do
    for one in $name; do
        case $one in
            check) stage check 150 ;;
            micro) stage micro 220 ;;
            model) stage model 90 ;;
            variants) stage variants 40 ;;
            tests) # the same tests as everywhere, where pytest is there and time is left
                left=$((limit - SECONDS - 40))
                if [[ ${options[1]} == cuda ]] && ((left > 20)) && "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
                    parallel=()
                    "$python" -c 'import xdist' 2>/dev/null && parallel=(-n 12)
                    timeout -k 5 "$left" "$python" -m pytest -q -o addopts= -p no:cacheprovider "${parallel[@]}" \
                        --rootdir "$root" -c "$root/pyproject.toml" "$root/tests/kernels" 2>&1 | tail -n 15
                fi ;;
            report) "$python" -m armhubert.bench gpu report "${options[@]:0:2}" --out "$out" || status=1 ;;
            *) echo "no stage $one: check micro model variants tests report" >&2; exit 2 ;;
        esac
    done
done
echo "=== $SECONDS s ==="
exit $status
