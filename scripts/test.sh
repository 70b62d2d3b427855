#!/usr/bin/env bash
# Sets the project up if need be, then checks it: style, types and the fast tests.
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: scripts/test.sh [--all] [pytest arguments]

Without arguments: env/install.sh, ruff, mypy, and the tests that are not marked slow, gpu, multiprocess or browser, on
all cores.

  --all    every test; those that need a GPU or a browser are skipped where there is none. The result (counts, seconds,
           what was skipped and why) is written to docs/testing.md
  --help   this text

Anything else goes to pytest, and ruff and mypy are left out: scripts/test.sh tests/utils -k spans
USAGE
}

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
all=false
pytest_arguments=()
for argument in "$@"; do
    case "$argument" in
        --all) all=true ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) pytest_arguments+=("$argument") ;;
    esac
done

cd "$ROOT"
python="$("$ROOT/env/install.sh" --print_python)"
# Several test processes share few cores: threads that spin while they wait take the time of those that work.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

failed=()
step() {
    local name="$1" started=$SECONDS
    shift
    "$@" </dev/null || failed+=("$name")
    echo "--- $name: $((SECONDS - started)) s"
}

if ((${#pytest_arguments[@]} == 0)); then
    step ruff "$python" -m ruff check
    step mypy "$python" -m mypy
fi
slow="slow or gpu or multiprocess or browser"
# The whole fast suite in a process for each core; a file stays in one, whose fixtures it shares.
spread=(-n logical --maxprocesses 8 --dist loadfile)
if ! $all; then
    ((${#pytest_arguments[@]})) || pytest_arguments=("${spread[@]}")
    step pytest "$python" -m pytest -m "not ($slow)" "${pytest_arguments[@]}"
else
    report="$(mktemp -d)"
    trap 'rm -rf "$report"' EXIT
    results=("$report/fast.xml" "$report/rest.xml")
    if ((${#pytest_arguments[@]})); then
        results=("$report/all.xml")
        step pytest "$python" -m pytest --junitxml "${results[0]}" "${pytest_arguments[@]}"
    else # those that start several processes, or are killed at certain moments, have the machine to themselves
        step "pytest, fast" "$python" -m pytest -m "not ($slow)" --junitxml "${results[0]}" "${spread[@]}"
        step "pytest, the rest" "$python" -m pytest -m "$slow" --junitxml "${results[1]}"
    fi
    "$python" scripts/summarise_tests.py "${results[@]}" docs/testing.md
fi
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
