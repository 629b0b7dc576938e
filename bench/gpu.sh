#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under nine minutes: correctness of every kernel, times against
# baselines, the student end to end, the choice of variants. From a bare checkout; needs torch, triton, numpy, einops,
# rich, safetensors, huggingface_hub, pyyaml and (for one baseline) transformers. Without a GPU: a rehearsal on the CPU.
#
#   bench/gpu.sh                             check micro model variants compiled report, the most important first
#   bench/gpu.sh check model report          some of them, which share the time
#   bench/gpu.sh tests                       tests/kernels, where pytest and hypothesis are there
#
# Where a GPU is lent for minutes at a time, make two calls; name OUT in both, as a file that is there already is added to:
#
#   OUT=DIR LIMIT=480 bench/gpu.sh check micro model variants report
#   OUT=DIR LIMIT=220 bench/gpu.sh compiled report
#
# Where DIR does not stay from one to the other, give the second EARLIER, or merge afterwards, which needs no GPU:
# python -m armhubert.bench gpu report --out DIR --result FILE
#
# OUT: where results go (bench/results); PYTHON: the interpreter (python3); LIMIT: seconds for everything (520); a
# stage that will not end, and the report, may exceed it by half a minute.
# EARLIER: a report of the same GPU from which the new one takes what was not reached or not run again.
# Ends with 0 where every check passed, with 3 where those reached did but some were not, else with another code.
set -u
[[ ${1:-} == --help ]] && { sed -n '2,/^set -u/{/^#/s/^# \?//p}' "${BASH_SOURCE[0]}"; exit 0; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-$root/bench/results}
limit=${LIMIT:-520}
mkdir -p "$out" && out=$(cd "$out" && pwd)
EARLIER=${EARLIER:+$(realpath "$EARLIER")}
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}" >&2; exit 1; }
[[ $python == /* ]] || python=$PWD/$python # not by realpath: what a virtual environment links to has not its packages

# The import names armhubert.kernels, .cli and .bench without an installation: a folder of links.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/armhubert"
for entry in "$root"/armhubert/* "$root/kernels" "$root/cli" "$root/bench"; do
    ln -s "$entry" "$package/armhubert/"
done
# many processes share the cores, and each would start a thread a core
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
threads=${TORCHINDUCTOR_COMPILE_THREADS:-12}
export PYTHONPATH="$package" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error KINETO_LOG_LEVEL=5
# every process would compile everything; a prefix for bytecode would leave out what PyTorch's folder has of it
unset PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX
cd "$package" || exit 1

probe='import einops, huggingface_hub, numpy, rich, safetensors, torch, triton, yaml; print(torch.cuda.is_available())'
found=$("$python" -c "$probe") || { echo "$python must import what the head of this file lists, see above" >&2; exit 1; }
if [[ $found == True ]]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
    options=(--device cuda)
elif [[ -n ${CUDA_VISIBLE_DEVICES-all} ]] && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "nvidia-smi lists a GPU that PyTorch cannot use: install a build for it, or rehearse: CUDA_VISIBLE_DEVICES=" >&2
    exit 1
else
    echo "=== no CUDA device: rehearsal, nothing here is a GPU figure ==="
    options=(--device cpu --quick)
fi

stages=(${@:-check micro model variants compiled report})
declare -A weight=([check]=135 [micro]=120 [model]=95 [variants]=40 [compiled]=110 [tests]=110)
for name in "${stages[@]}"; do
    [[ -n ${weight[$name]:-} || $name == report ]] ||
        { echo "no stage $name: check micro model variants compiled tests report" >&2; exit 2; }
done

status=0
share() { # its part of what is left, but half a minute for the report, by weight among the stages still to come
    local total=0 name
    for name in "$@"; do total=$((total + ${weight[$name]:-0})); done
    echo $(((limit - SECONDS - 30) * ${weight[$1]} / total))
}

stage() { # NAME SECONDS; one that outlives its budget is ended with its processes, and what it has written stays
    if [[ $1 == tests ]]; then
        local parallel=()
        "$python" -c 'import xdist' 2>/dev/null && parallel=(-n 12)
        timeout -k 5 "$2" "$python" -m pytest -q -o addopts= -p no:cacheprovider "${parallel[@]}" \
            --rootdir "$root" -c "$root/pyproject.toml" "$root/tests/kernels"
    else
        timeout -k 5 $(($2 + 20)) "$python" -m armhubert.bench gpu "$1" "${options[@]}" --budget "$2" --out "$out"
    fi
}

for index in "${!stages[@]}"; do
    name=${stages[index]}
    case $name in
        report)
            timeout -k 5 60 "$python" -m armhubert.bench gpu report --out "$out" ${EARLIER:+--result "$EARLIER"} ||
                { code=$?; ((status)) || status=$code; } ;;
        *)
            seconds=$(share "${stages[@]:index}")
            ((seconds < 10)) && { echo "=== $name: no time left ==="; continue; }
            echo "=== $name, at most $seconds s, $SECONDS s in ==="
            # checks that compile run beside each other
            TORCHINDUCTOR_COMPILE_THREADS=$([[ $name == check ]] && echo 1 || echo "$threads") stage "$name" "$seconds" ||
                { status=$?; echo "=== $name ended with $status ==="; } ;;
    esac
done
echo "=== $SECONDS s ==="
exit $status
