#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under nine minutes: correctness of every kernel, times against
# baselines, the student end to end, the choice of variants. From a bare checkout; needs torch, triton, einops, rich,
# safetensors, huggingface_hub, pyyaml and (for one baseline) transformers. Without a GPU: a rehearsal on the CPU.
#
#   bench/gpu.sh                             all stages, the most important first
#   bench/gpu.sh check model report          some of them, which share the time
#   bench/gpu.sh variants compiled report    what needs compilers' minutes, on its own
#
# OUT: where results go (bench/results); PYTHON: the interpreter (python3); LIMIT: seconds for everything (520).
# EARLIER: a report of the same GPU whose other stages the new one takes over.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-$root/bench/results}
limit=${LIMIT:-520}
mkdir -p "$out" && out=$(cd "$out" && pwd)
EARLIER=${EARLIER:+$(realpath "$EARLIER")}
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}" >&2; exit 1; }

# The import names armhubert.kernels, .cli and .bench without an installation: a folder of links.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/armhubert"
for entry in "$root"/armhubert/* "$root/kernels" "$root/cli" "$root/bench"; do
    ln -s "$entry" "$package/armhubert/"
done
# many processes share the cores, and each would start a thread a core
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-12}
export PYTHONPATH="$package" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cd "$package" || exit 1

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
    options=(--device cuda)
else
    echo "=== no CUDA device: rehearsal, nothing here is a GPU figure ==="
    options=(--device cpu --quick)
fi

stages=(${@:-check micro model variants compiled tests report})
declare -A weight=([check]=140 [micro]=130 [model]=80 [variants]=30 [compiled]=110)
for name in "${stages[@]}"; do
    [[ -n ${weight[$name]:-} || $name == tests || $name == report ]] ||
        { echo "no stage $name: check micro model variants compiled tests report" >&2; exit 2; }
done

status=0
share() { # its part of what is left, but half a minute for the report, by weight among the stages still to come
    local total=0 name
    for name in "$@"; do total=$((total + ${weight[$name]:-0})); done
    echo $(((limit - SECONDS - 30) * ${weight[$1]} / total))
}

for index in "${!stages[@]}"; do
    name=${stages[index]}
    case $name in
        report)
            "$python" -m armhubert.bench gpu report --out "$out" ${EARLIER:+--result "$EARLIER"} || status=1 ;;
        tests) # the same tests as everywhere, where pytest is there and time is left
            left=$((limit - SECONDS - 40))
            if [[ ${options[1]} == cuda ]] && ((left > 20)) && "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
                parallel=()
                "$python" -c 'import xdist' 2>/dev/null && parallel=(-n 12)
                timeout -k 5 "$left" "$python" -m pytest -q -o addopts= -p no:cacheprovider "${parallel[@]}" \
                    --rootdir "$root" -c "$root/pyproject.toml" "$root/tests/kernels" 2>&1 | tail -n 15
            fi ;;
        *)
            seconds=$(share "${stages[@]:index}")
            ((seconds < 10)) && { echo "=== $name: no time left ==="; continue; }
            echo "=== $name, at most $seconds s, $SECONDS s in ==="
            # a stage that outlives its budget is ended with its processes; what it has written stays
            timeout -k 5 $((seconds + 20)) "$python" -m armhubert.bench gpu "$name" "${options[@]}" --budget "$seconds" \
                --out "$out" || { status=$?; echo "=== $name ended with $status ==="; } ;;
    esac
done
echo "=== $SECONDS s ==="
exit $status
