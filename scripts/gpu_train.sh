#!/usr/bin/env bash
# Trains both small models and scores them, in one go on a GPU, from a bare checkout and without network.
#
#     scripts/gpu_train.sh          on a machine with a GPU
#     scripts/gpu_train.sh --tiny   two steps of both, without scores, on any machine
#
# Takes $BUDGET seconds (540): 60 % train `tiny` from the shipped weights, 25 % `tiny-joint` from the result, the rest
# scores both. Weights, logs and scores go to $OUT (out/gpu_train): copy $OUT/tiny/weights/* to pipelines/tiny/weights
# and $OUT/joint/weights/* to pipelines/tiny/weights_joint, fill in the model cards and measure anew what was measured on
# the old ones. A longer run goes on from $OUT/tiny/run with a larger BUDGET. Wheels are installed as in gpu_check.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
wheels=${WHEELS:-.wheels}
budget=${BUDGET:-540}
out=${OUT:-out/gpu_train}
device=cuda loaders=${LOADERS:-$(($(nproc) - 2))}
score=(--device cuda --dtype bfloat16 --grid 33x256x256 --steps 20 --batch 8 --by)
length() { echo --minutes "$(awk -v s="$budget" -v share="$1" 'BEGIN {print s * share / 60}')"; }
if [ "${1:-}" = "--tiny" ]; then
  device=cpu loaders=1
  length() { echo --steps 2 --tokens 640 --held-out 0; }
elif [ $# -gt 0 ]; then
  echo "gpu_train.sh: unknown argument $1; it takes --tiny or nothing" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if compgen -G "$wheels/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$work/site" \
    "$wheels"/*.whl
  PYTHONPATH="$PWD:$work/site${PYTHONPATH#"$PWD"}"
fi

# train KIND NAME INIT SHARE
train() {
  # shellcheck disable=SC2046  # two words are wanted
  "$python" scripts/train_tiny.py --kind "$1" --run "$out/$2/run" --export "$out/$2/weights" --init "$3" \
    --device "$device" --loaders "$loaders" $(length "$4")
}
mkdir -p "$out"
train tiny tiny pipelines/tiny/weights 0.60
train tiny-joint joint "$out/tiny/weights" 0.25
# The second model's codec lies beside the first one's weights.
cp "$out/tiny/weights/codec.safetensors" "$out/joint/weights/"
if [ "$device" = cpu ]; then exit; fi
for name in tiny joint; do
  model=tiny
  if [ "$name" = joint ]; then model=tiny-joint; fi
  left=$((budget > SECONDS ? budget - SECONDS : 0))
  if [ "$name" = tiny ]; then left=$((left / 2)); fi
  "$python" scripts/eval_tiny.py --model "$model" --weights "$out/$name/weights" "${score[@]}" \
    --minutes "$(awk -v s="$left" 'BEGIN {print (s > 60 ? s / 60 : 1)}')" --parts "$out/$name/parts" \
    --json "$out/$name/scores.json" --sheet "$out/$name/sheet.png"
done
