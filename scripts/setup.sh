# Sourced by the other scripts: makes .venv once, installs the pinned versions, and activates it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python_command=${PYTHON:-python3}
pins=scripts/constraints.txt
stamp=.venv/.installed-$(cat pyproject.toml "$pins" | cksum | cut -d ' ' -f 1)

if [ ! -f "$stamp" ]; then
    "$python_command" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
        exit 1
    }
    echo "installing into .venv (once; about 1.5 GB)"
    [ -x .venv/bin/python ] || "$python_command" -m venv .venv
    # torch first and pinned: torchvision alone would bring the newest torch, with gigabytes of CUDA libraries
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$pins" torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$pins" --editable '.[dev]'
    touch "$stamp"
fi
. .venv/bin/activate
