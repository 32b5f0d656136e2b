#!/bin/sh
# Inside the image, after the lock file's packages: torch, which the lock leaves out because its CPU and CUDA builds have
# the same version.
set -eu
uv pip install --no-deps "torch==2.13.0" --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
