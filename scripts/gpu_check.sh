#!/usr/bin/env bash
# Runs the GPU tests and both benchmarks in under nine minutes, from a bare checkout, without network.
#
#     scripts/gpu_check.sh          on a machine with a GPU
#     scripts/gpu_check.sh --tiny   a small run of every part, on any machine
#
# Needs torch, triton, pytest, typer, rich and PyYAML; wheels in $WHEELS (.wheels, see scripts/gpu_wheels.sh) are
# installed into a folder of their own first. Results go to $OUT, by default benchmarks/results/<gpu>/: summary.md,
# check.json, kernels.json, pipeline.json and tests.log. Every part gets a share of $BUDGET seconds (500), and keeps what
# it has when that is used up. The exit status is 1 if a test failed, a result was wrong or a part did not finish.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
wheels=${WHEELS:-.wheels}
budget=${BUDGET:-500}
tiny=""
if [ "${1:-}" = "--tiny" ]; then
  tiny=yes
elif [ $# -gt 0 ]; then
  echo "gpu_check.sh: unknown argument $1; it takes --tiny or nothing" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if compgen -G "$wheels/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$work/site" \
    "$wheels"/*.whl || exit 1
  PYTHONPATH="$PWD:$work/site${PYTHONPATH#"$PWD"}"
fi

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 1
if [ -z "$gpu" ] && [ -z "$tiny" ]; then
  echo "gpu_check.sh: torch sees no GPU; --tiny runs a small check without one" >&2
  exit 1
fi
folder=$(printf '%s' "${gpu:-cpu}" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]' '-')
out=${OUT:-benchmarks/results/${folder%-}}
mkdir -p "$out" || exit 1
# Nothing of an earlier run may pass for this one's.
rm -f "$out/check.json" "$out/kernels.json" "$out/pipeline.json" "$out/summary.md"
: > "$out/tests.log"
: > "$work/parts"

left() { echo $((budget - SECONDS)); }

# part NAME LIMIT COMMAND...: runs it for LIMIT seconds at most and notes how it ended.
part() {
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  if [ "$limit" -lt 5 ]; then
    echo "== $name: no time left" >&2
    printf '%s\t124\t0\n' "$name" >> "$work/parts"
    return
  fi
  echo "== $name, at most $limit s" >&2
  timeout --signal=INT --kill-after=15 "$limit" "$@" || code=$?
  printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - began)) >> "$work/parts"
}

# Tests of kernels, which run compiled where there is a GPU, and those that need one.
kernel_tests=(block_sparse block_sparse_tma block_sparse_backward block_mass quantized cluster_errors kmeans_triton mix
  sparse_linear verdict attend program_order tuning)
tests() {
  local name=$1 limit=$2 workers=()
  shift 2
  if "$python" -c 'import xdist' 2> /dev/null && [ -z "$tiny" ]; then
    workers=(-n 8)
  fi
  # What fails is said at the end of the log; the summary of a run that was cut short too.
  part "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors "${workers[@]}" "$@" \
    >> "$out/tests.log" 2>&1
}

files=()
for name in "${kernel_tests[@]}"; do
  if [ -e "tests/test_$name.py" ]; then files+=("tests/test_$name.py"); fi
done
mapfile -t marked < <(grep -l 'mark\.gpu' tests/test_*.py)
kernels=(--json "$out/kernels.json" --table "$work/kernels.md" --shapes "${SHAPES:-wan-720p,wan-480p}")
pipeline=(--json "$out/pipeline.json" --table "$work/pipeline.md")
if [ -n "$tiny" ]; then
  files=(tests/test_orders.py)
  marked=(tests/test_dense.py)
  kernels+=(--shapes tiny --impls "torch,sdpa" --densities .25 --repeats 3)
  pipeline+=(--models tiny --method "topk:density=0.1,impl=torch")
fi

tests "kernel tests" $((budget / 4)) "${files[@]}"
tests "GPU tests" $((budget / 11)) -m gpu "${marked[@]}"
seconds=$((budget * 9 / 25))
part "kernel benchmark" $((seconds + 30)) "$python" scripts/bench_kernels.py --seconds "$seconds" "${kernels[@]}" \
  > "$work/kernels.log"
if "$python" -c 'import diffusers' 2> /dev/null; then
  seconds=$(($(left) - 30))
  part "pipeline benchmark" $((seconds + 15)) "$python" scripts/bench_pipeline.py --seconds "$seconds" "${pipeline[@]}" \
    > "$work/pipeline.log"
else
  echo "== pipeline benchmark: diffusers is not installed; scripts/gpu_wheels.sh downloads it"
  printf 'pipeline benchmark\t127\t0\n' >> "$work/parts"
fi

"$python" scripts/gpu_summary.py --parts "$work/parts" --tests "$out/tests.log" --out "$out" \
  --tables "$work/kernels.md" --tables "$work/pipeline.md"
