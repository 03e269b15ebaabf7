#!/usr/bin/env bash
# Download what a machine without a network lacks to run varl, as wheels in a folder that git ignores:
#
#   tools/gpu/wheels.sh --python 3.12 --platform manylinux_2_28_x86_64 --installed FILE [--out tools/gpu/wheels]
#
# FILE is what `pip freeze` prints on that machine; tools/gpu/image.txt is an example. This needs a network, and pip.
# PYTHON names the interpreter that runs it; by default that of .venv, or else python3.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
"$python" -m pip --version >/dev/null || { echo "wheels: $python has no pip; install pip, or set PYTHON" >&2; exit 1; }
PYTHONPATH=$root exec "$python" -m tools.gpu.wheels "$@"
