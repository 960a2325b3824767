#!/usr/bin/env bash
# Downloads the wheels that scripts/gpu_check.sh installs on a GPU machine without network.
#
#     scripts/gpu_wheels.sh [package ...]
#
# Packages that PyTorch images commonly lack are downloaded by default, in the versions of constraints.txt, for Python
# $PYTHON_VERSION (3.12) on x86-64 Linux, into $WHEELS (.wheels, which git ignores). Their own needs are not: name them.
# torch and triton are never among them: the machine brings its own.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
wheels=${WHEELS:-.wheels}
limit_mib=64
packages=("$@")
if [ ${#packages[@]} -eq 0 ]; then
  packages=(diffusers importlib-metadata zipp requests charset-normalizer idna certifi urllib3 ftfy wcwidth)
fi

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done

mkdir -p "$wheels"
rm -f "$wheels"/*.whl
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "${PYTHON_VERSION:-3.12}" --implementation cp "${platforms[@]}" \
  --constraint constraints.txt --dest "$wheels" "${packages[@]}"

size=$(du -sm "$wheels" | cut -f1)
if [ "$size" -ge "$limit_mib" ]; then
  echo "gpu_wheels.sh: $wheels holds $size MiB, the limit is $limit_mib: name fewer packages" >&2
  exit 1
fi
ls -1 "$wheels"
