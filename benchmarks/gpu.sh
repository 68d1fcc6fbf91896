#!/usr/bin/env bash
# Everything a GPU is needed for, in one command, under nine minutes and without a network:
# correctness on the device, the open checks, the times beside the rivals, the goals, one page.
#
#   benchmarks/gpu.sh [OUTPUT_DIR] [WHEELS_DIR]
#
# OUTPUT_DIR (runs/gpu) receives stages.csv, checks.csv, kernels.csv, kernels.png, goals.md,
# lora_table.json, engines_gpu.csv, summary.md and log.txt. WHEELS_DIR holds wheels of rivals that
# are to be timed as well; they are installed into a temporary folder, and nothing is fetched.
# $PYTHON (python3) runs everything.
# Exit status: 1 if a stage that checks correctness failed, 2 without CUDA, else 0.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
total="${GPU_SECONDS:-525}" # of all stages together

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "no CUDA device that torch can see: benchmarks/gpu.sh needs a GPU" >&2
    exit 2
fi

export PYTHONPATH="$root" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false
# Said once, before anything is written: the folder may lie in the tree, and the table does.
PPO_NLU_COMMIT="$("$python" -c 'from benchmarks import timing; print(timing.commit())')"
export PPO_NLU_COMMIT
mkdir -p "${1:-runs/gpu}" || exit 1
out="$(cd "${1:-runs/gpu}" && pwd)"
wheels="${2:+$(cd "$2" && pwd)}"
cd "$root" || exit 1
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
unset PPO_NLU_BACKEND TRITON_INTERPRET
log="$out/log.txt"
: >"$log"
echo "stage,result,seconds" >"$out/stages.csv"
wrong=0

# stage NAME SECONDS RESERVE COMMAND...: at most SECONDS, and never the RESERVE that later stages need.
stage() {
    local name="$1" limit="$2" left=$((total - SECONDS - $3)) began=$SECONDS status result
    shift 3
    ((left < limit)) && limit=$left
    if ((limit < 5)); then
        result="left out: no time"
        status=124
    else
        printf '\n== %s (at most %d s)\n' "$name" "$limit" | tee -a "$log"
        timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
        status=${PIPESTATUS[0]}
        case "$status" in
            0) result=ok ;;
            124 | 137) result="out of time" ;;
            *) result="failed ($status)" ;;
        esac
    fi
    echo "$name,$result,$((SECONDS - began))" | tee -a "$out/stages.csv" "$log"
    return "$status"
}

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

about() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "triton", "numpy", "transformers", "peft", "trl", "liger-kernel"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "not installed")
PYTHON
}

device_tests() {
    local found=() parallel=() file
    for file in tests/ops/test_{kernels,ppo_loss,lora_kernels,logprob_kernels}.py; do
        [[ -f $file ]] && found+=("$file") || echo "left out: $file is not there"
    done
    # Most of the time goes to compiling, which several processes share; so do they their cache.
    has xdist && parallel=(-n 8)
    "$python" -m pytest -q -p no:cacheprovider --durations=5 "${parallel[@]}" "${found[@]}"
}

sanitizer() {
    local report="$work/sanitizer.txt"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$python" benchmarks/gpu_checks.py --small >"$report" 2>&1
    local status=$?
    grep -v '^ok ' "$report" | head -c 20000
    if ! grep -q 'ERROR SUMMARY' "$report" || grep -q 'Device not supported' "$report"; then
        echo "compute-sanitizer does not run on this machine: nothing was checked by it"
        return 0
    fi
    return "$status"
}

export -f has about device_tests sanitizer
export python work

stage about 20 0 bash -c about
if [[ -n $wheels ]]; then
    stage wheels 40 400 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
        --target "$work/site" "$wheels"/*.whl
    # Before what is installed: the folder should hold rivals alone, unless torch is to be another.
    export PYTHONPATH="$root:$work/site"
fi

late() { (($1 == 124 || $1 == 137)); } # a status that says nothing about correctness

tested=1
if has pytest && has hypothesis; then
    stage tests 170 250 bash -c device_tests || wrong=1
else
    tested=0
    echo "pytest or hypothesis is missing: small shapes against float64 instead of the tests"
fi
stage small 90 230 "$python" benchmarks/gpu_checks.py --small
status=$?
((status == 0)) || { ((tested)) && late "$status"; } || wrong=1
if command -v compute-sanitizer >/dev/null; then
    stage sanitizer 75 200 bash -c sanitizer
    status=$?
    ((status == 0)) || late "$status" || wrong=1
else
    echo "sanitizer,not installed,0" | tee -a "$out/stages.csv" "$log"
fi

stage checks 120 150 "$python" benchmarks/gpu_checks.py --output "$out" --budget 105
bench=("$python" benchmarks/kernels.py --csv "$out/kernels.csv")
stage "lora table" 75 110 "${bench[@]}" --shapes lora_linear:16x4096x4096x16 --write-table \
    --modes forward --repeats 10 --against addmm
cp kernels/lora_table.json "$out/" 2>>"$log"
qwen=linear_logprobs:8192x3584x152064
stage "key shapes" 130 60 "${bench[@]}" --repeats 20 --seconds-each 1 \
    --modes forward forward+backward forward+backward+entropy \
    --shapes "$qwen" lora_linear:8192x4096x4096x16 token_logprobs:8192x151936 gae:512x1024 \
    ppo_loss:512x16 linear_logprobs:256x3584x152064 linear_logprobs:256x4096x32000 \
    lora_linear_grouped:8192x4096x4096+4096+4096x16
stage goals 45 20 "$python" benchmarks/gpu_checks.py --goals --output "$out" --budget 30
# A training step at real size beside its roofline, and beside TRL where its wheels were given.
stage engines 110 45 "$python" benchmarks/engine_roofline.py --csv "$out/engines_gpu.csv" --budget 70
rest=$((total - SECONDS - 25))
stage "other shapes" 400 15 "${bench[@]}" --repeats 15 --seconds-each 0.5 --resume \
    --against naive addmm peft peft-fp32-adapters liger-flsce trl cce --budget "$((rest - 10))"
stage plot 15 5 "$python" benchmarks/kernels.py --rows "$out/kernels.csv" --plot "$out/kernels.png"
stage summary 15 0 "$python" benchmarks/gpu_checks.py --summary --output "$out"

printf '\n%d s in all\n' "$SECONDS"
cat "$out/stages.csv"
exit "$wrong"
