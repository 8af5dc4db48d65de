#!/usr/bin/env bash
# What only a GPU can tell, in one command of at most 8 minutes: a table on the terminal, and the same as gpu_check.json.
#
#   scripts/gpu_check.sh                        on the first GPU
#   scripts/gpu_check.sh --device cpu --tiny    tries the script itself on a CPU; no figure of it means anything
#   WHEELS=DIR scripts/gpu_check.sh             on a machine without a network, which lacks packages: DIR holds wheels
#
# Nothing is downloaded: weights are random. PYTHON names the interpreter (python3 unless given).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"$python" scripts/gpu_check.py "$@"
