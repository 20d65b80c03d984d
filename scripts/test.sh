#!/usr/bin/env bash
# Sets up like quickstart.sh, then runs the checks and tests. Arguments go to pytest: bash scripts/test.sh -m slow
. "$(dirname "$0")/setup.sh"
ruff check .
ruff format --check .
# one thread each: results in float32 depend on the number of threads
OMP_NUM_THREADS=1 python -m pytest --numprocesses "${TEST_PROCESSES:-2}" "$@"
