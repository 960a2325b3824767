#!/usr/bin/env bash
# Measures anew everything that README and docs say of the weights of `tiny`, after they have changed.
#
#     scripts/measure_shipped.sh             every part, one after the other (hours on two cores)
#     scripts/measure_shipped.sh compare     one part: compare, capture, study, frontier or scores
#     scripts/measure_shipped.sh --tiny      every part at the smallest size, to see that it works; results in $OUT only
#
# Results go to $RESULTS (benchmarks/results/cpu), where documentation and README take their tables from; working files
# to $OUT (out/measure_shipped). $SCORES has the grids that are scored, each as GRID:STEPS:PROMPTS:SEEDS:MINUTES, and
# $PROMPTS how many prompts the frontier is measured on.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
out=${OUT:-out/measure_shipped}
results=${RESULTS:-benchmarks/results/cpu}
scores=${SCORES:-17x128x128:20:96:2:30 33x128x128:20:48:1:15 33x256x256:20:96:2:25}
prompt="a large red circle moves right over a gradient background"
size=(--steps 20) at=4,5,9,15 first=2 seeds=0,1 frontier=(--at 4,15 --prompts "${PROMPTS:-2}") truth=150
parts=(compare capture study frontier scores)
case "${1:-}" in
  "") ;;
  --tiny)
    size=(--steps 4 --height 64 --width 64 --frames 9) at=1,2 first=1 seeds=0 frontier=(--only radial) truth=4
    results=$out/results scores=17x96x96:2:1:1:1
    ;;
  compare | capture | study | frontier | scores) parts=("$1") ;;
  *)
    echo "measure_shipped.sh: unknown argument $1; it takes a part (${parts[*]}), --tiny or nothing" >&2
    exit 2
    ;;
esac
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out" "$results"
captures=$out/captures

# compare_one NAME OPTIONS...
compare_one() {
  "$python" -m dsattn compare "$prompt" "${size[@]}" --repeats 1 --quiet --out "$out/$1" "${@:2}"
  cp "$out/$1/report.json" "$results/compare_$1_gradient_20_steps.json"
}

for part in "${parts[@]}"; do
  printf '\n== %s (%ss)\n' "$part" "$SECONDS"
  case "$part" in
    compare)
      compare_one semantic
      compare_one auto_balanced --preset balanced
      ;;
    capture)
      rm -rf "$captures"
      "$python" scripts/capture_qkv.py --out "$captures" "${size[@]}" --at "$at" --first "$first" --seeds "$seeds" \
        --store float16
      ;;
    study) "$python" scripts/attention_study.py measure --captures "$captures" --out "$results" ;;
    frontier)
      "$python" scripts/frontier.py measure --captures "$captures" "${frontier[@]}" --json "$results/frontier.json" \
        --markdown "$results/frontier.md" --plot "$results/frontier.png"
      ;;
    scores)
      for score in $scores; do
        IFS=: read -r grid steps prompts clips minutes <<< "$score"
        "$python" scripts/eval_tiny.py --grid "$grid" --steps "$steps" --limit "$prompts" --seeds "$clips" \
          --minutes "$minutes" --truth "$truth" --batch 4 --by \
          --json "$results/eval_tiny_$grid.json" --sheet "$out/sheet_$grid.png"
      done
      ;;
  esac
done
if [ "$results" = benchmarks/results/cpu ]; then "$python" scripts/readme_tables.py; fi
