#!/usr/bin/env bash
# Everything to check on the day a GPU is at hand: bash tests/gpu.sh OUT, in at most 8 minutes.
#
# Needs Python 3.11 or newer, torch, transformers and peft; no LIBERO, no TensorFlow, no network. What else is missing is
# installed from WHEELS, a folder of wheels, if it is given:
#   python -m pip download --only-binary=:all: --python-version 3.12 --no-deps -d wheels tyro docstring-parser \
#       typeguard typing-extensions google-crc32c
#   WHEELS=wheels bash tests/gpu.sh OUT
# Writes OUT/gpu.json and OUT/gpu.md and ends with a line for each check. More options: tests/gpu.py --help.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(command -v python3 || command -v python)
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
fi
exec "$python" tests/gpu.py "$@"
