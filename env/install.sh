#!/usr/bin/env bash
# Installs everything the project needs into an environment of its own. Run again, it finds that out in a second.
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: env/install.sh [options]

Makes .venv at the root of the repository and installs the project and its packages there. Needs Python 3.11 or newer.
The build of torch follows the NVIDIA driver; without a GPU it is whatever the package registry offers.

  --conda             make the conda environment vtg_env instead of .venv (the default while vtg_env is active)
  --torch_index URL   wheel index for torch and torchvision, e.g. a mirror (default: chosen from the driver)
  --with-flash-attn   also build flash-attn, which is optional: without it attention runs on sdpa
  --print_plan        print the commands and run none
  --print_python      in the end print the path of the environment's Python on standard output, and nothing else there
  --help              this text

CUDA_VISIBLE_DEVICES= (empty) leaves a GPU and its driver unused. With VTG_PYTHON=/path/to/python the project uses that
interpreter as it is, and nothing is installed.
USAGE
}

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
CONDA_NAME=vtg_env
use_conda=false flash_attn=false print_plan=false print_python=false torch_index=""

say() { printf '%s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 2
}

parse_options() {
    if [[ "${CONDA_DEFAULT_ENV:-}" == "$CONDA_NAME" ]]; then use_conda=true; fi
    while (($#)); do
        case "${1//_/-}" in
            --conda) use_conda=true ;;
            --with-flash-attn) flash_attn=true ;;
            --print-plan) print_plan=true ;;
            --print-python) print_python=true ;;
            --torch-index)
                (($# > 1)) || fail "--torch_index needs a URL"
                torch_index="$2"
                shift
                ;;
            --help | -h)
                usage
                exit 0
                ;;
            *) fail "unknown option $1; env/install.sh --help lists them" ;;
        esac
        shift
    done
}

# An active environment or an inherited path must not leak in. Index, proxy and certificates of pip stay the user's.
isolate() {
    unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_ROOT
    export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1
}

# --- which torch ------------------------------------------------------------------------------------------------------

# Prints the newest CUDA version the driver runs (12.4), or nothing where there is no GPU to use.
driver_cuda() {
    local output status=0
    if [[ "${CUDA_VISIBLE_DEVICES-unset}" =~ ^(-1)?$ ]] || ! command -v nvidia-smi >/dev/null; then return; fi
    output="$(nvidia-smi 2>&1)" || status=$?
    if [[ $status == 6 || "$output" == *"No devices were found"* ]]; then return; fi
    ((status == 0)) ||
        fail "nvidia-smi fails: ${output%%$'\n'*} Mend the NVIDIA driver, or set CUDA_VISIBLE_DEVICES= to do without the GPU"
    [[ "$output" =~ CUDA(\ [A-Z]+)?\ Version:\ *([0-9]+\.[0-9]+) ]] ||
        fail "nvidia-smi names no CUDA version to choose torch by; set CUDA_VISIBLE_DEVICES= to do without the GPU"
    echo "${BASH_REMATCH[2]}"
}

# Sets torch_for, torch_index and torch_requirements. A driver runs builds for its own CUDA version or an older one. The
# upper bounds keep builds for a newer CUDA away, which an index of the user's own may offer beside these.
choose_torch() {
    local cuda="$1" tag="" bound=""
    local -i number=0
    torch_for="no GPU"
    if [[ -n "$cuda" ]]; then
        number=$((10#${cuda%.*} * 100 + 10#${cuda#*.}))
        torch_for="driver for CUDA $cuda"
    fi
    if ((number == 0 || number >= 1300)); then
        : # what the registry has: built for CUDA 13, and it runs on the CPU as well
    elif ((number >= 1208)); then
        tag=cu128 bound=",<2.11"
    elif ((number >= 1206)); then
        tag=cu126 bound=",<2.8"
    elif ((number >= 1200)); then
        tag=cu124 bound=",<2.7"
    elif ((number >= 1108)); then
        tag=cu118 bound=",<2.8"
    else
        fail "the NVIDIA driver runs CUDA $cuda at most, too old for torch 2.6; update it, or set CUDA_VISIBLE_DEVICES= to" \
            "do without the GPU"
    fi
    torch_requirements=("torch>=2.6$bound" torchvision)
    if [[ -z "$torch_index" && -n "$tag" ]]; then torch_index="https://download.pytorch.org/whl/$tag"; fi
}

# --- which Python -----------------------------------------------------------------------------------------------------

find_python() {
    local candidate without_venv=""
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        without_venv="$candidate"
    done
    [[ -z "$without_venv" ]] ||
        fail "$without_venv cannot make virtual environments; install its venv package (Debian, Ubuntu: apt-get install" \
            "$without_venv-venv)"
    fail "no Python 3.11 or newer on PATH; install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv), or" \
        "use --conda"
}

# Sets prefix and python, whether they are there yet or not.
locate_environment() {
    prefix="$ROOT/.venv"
    if $use_conda; then
        command -v conda >/dev/null || fail "--conda needs conda on PATH; install Miniforge, or leave --conda out"
        prefix="$(conda run --name "$CONDA_NAME" python -c 'import sys; print(sys.prefix)' 2>/dev/null)" ||
            prefix="$(conda info --base)/envs/$CONDA_NAME"
    fi
    python="$prefix/bin/python"
}

make_environment() {
    if "$python" -m pip --version >/dev/null 2>&1 && { $use_conda || ! moved; }; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "$prefix holds $("$python" -V), and the project needs 3.11 or newer; remove that folder and run again"
    elif $use_conda; then
        run conda create --yes --quiet --name "$CONDA_NAME" python=3.11 pip >&2
        locate_environment
    else # there is none, or it was interrupted before it had a pip, or it was moved here and its commands are broken
        [[ ! -L "$prefix" ]] ||
            fail "$prefix is a link to $(readlink "$prefix"), which belongs to another checkout and would be emptied; remove" \
                "the link, or set VTG_PYTHON to the Python in it"
        local base
        base="$(find_python)"
        run "$base" -m venv --clear "$prefix"
    fi
}

# --- the stamp that says "complete": written last, removed first ------------------------------------------------------

stamp_line() { sed -n "s/^$1: //p" "$prefix/vtg_installed" 2>/dev/null || true; }

moved() { [[ -f "$prefix/vtg_installed" && "$(stamp_line root)" != "$ROOT" ]]; }

expected_stamp() {
    local torch="${torch_requirements[*]} $torch_index ($torch_for)"
    # any build runs on the CPU, so one for a GPU is kept where there is none to use just now
    if [[ "$torch_for" == "no GPU" && -z "$torch_index" ]]; then torch="$(stamp_line torch)"; fi
    echo "root: $ROOT"
    echo "python: $("$python" -V 2>&1)"
    echo "torch: ${torch:-${torch_requirements[*]} ($torch_for)}"
    echo "files: $(cd "$ROOT" && cat pyproject.toml env/install.sh env/requirements.txt env/editable_only.py |
        "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
}

is_complete() {
    [[ -x "$python" && -f "$prefix/vtg_installed" && "$(expected_stamp)" == "$(cat "$prefix/vtg_installed")" ]]
}

# --- running ----------------------------------------------------------------------------------------------------------

run() {
    if $print_plan; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# Turns pip's output into one line per large download; on a terminal, into one line that shows what goes on just now.
show_progress() {
    local line text name="" shown=$SECONDS
    while IFS= read -r line; do
        text=""
        case "$line" in
            Collecting\ * | *Building\ wheel*) if [[ -t 2 ]]; then text="${line## }"; fi ;;
            *Downloading*.metadata*) ;;
            *Downloading*)
                name="${line##*/}" name="${name##*Downloading }"
                if [[ -t 2 || "$name" =~ [0-9]{2,}(\.[0-9]+)?\ MB|GB ]]; then text="Downloading $name"; fi
                ;;
            Progress\ *)
                # eight digits at least: progress of less than 10 MB is none
                if [[ "$line" =~ ^Progress\ ([0-9]+)\ of\ ([0-9]{8,}) ]] && { [[ -t 2 ]] || ((SECONDS - shown >= 10)); }; then
                    text="$name: $((BASH_REMATCH[1] / 1000000)) of $((BASH_REMATCH[2] / 1000000)) MB"
                fi
                ;;
            Installing\ collected*) text="Unpacking $(wc -w <<<"${line#*: }") package(s)" ;;
        esac
        if [[ -z "$text" ]]; then continue; fi
        shown=$SECONDS
        if [[ -t 2 ]]; then printf '\r\033[K  %.110s' "$text" >&2; else say "  $text"; fi
    done
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
}

run_pip() {
    if $print_plan; then
        run "$python" -m pip install "$@"
        return
    fi
    local bar=off # `raw` came with pip 24.1
    if [[ "$("$python" -m pip install --help)" =~ [^a-z]raw[^a-z] ]]; then bar=raw; fi
    "$python" -m pip install --no-input --progress-bar "$bar" "$@" 2>&1 </dev/null | tee -a "$log" | show_progress
}

pip_install() {
    if ! run_pip "$@"; then
        say "----- the end of $log:"
        tail -n 15 "$log" >&2
        fail "pip install failed (above); run the same command again to go on where it stopped"
    fi
}

install_torch() {
    local index=()
    if [[ -n "$torch_index" ]]; then index=(--index-url "$torch_index"); fi
    say "[2/4] torch for this machine ($torch_for; up to 3 GB)"
    pip_install ${index[@]+"${index[@]}"} "${torch_requirements[@]}"
}

# The pair chosen above is kept: without the constraints pip may take another torch to please some package.
install_project() {
    local constraints="$prefix/vtg_constraints.txt"
    say "[3/4] the other packages"
    if ! $print_plan; then
        "$python" -m pip list --format=freeze | grep -E '^torch(vision)?==' >"$constraints"
    fi
    cd "$ROOT" # paths in a requirements file count from the working directory
    pip_install --constraint "$constraints" -r env/requirements.txt -e ".[dev]"
}

check() {
    say "[4/4] checking"
    if $print_plan; then return; fi
    "$python" - "${torch_for#no GPU}" <<'PYTHON' || fail "torch as installed does not work here (above)"
import sys

import torch
import torchvision.ops

boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
torchvision.ops.nms(boxes, torch.ones(1), 0.5)  # fails where torch and torchvision are not built for each other
if sys.argv[1]:
    built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        sys.exit(
            f"a GPU is there ({sys.argv[1]}) and torch cannot use it: {built}. Update the driver, name an index with a "
            "fitting build (--torch_index), or set CUDA_VISIBLE_DEVICES= to do without the GPU"
        )
    try:
        torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda")).sum().item()
    except RuntimeError as error:
        sys.exit(f"a first product on {torch.cuda.get_device_name()} fails: {error} ({built})")
PYTHON
}

install_flash_attn() {
    if ! $print_plan && "$python" -c 'import flash_attn' 2>/dev/null; then return; fi
    say "flash-attn (built from source: minutes to an hour)"
    if ! run_pip --no-build-isolation flash-attn; then
        say "flash-attn could not be built (details: $log); attention will run on sdpa"
    fi
}

wait_for_other_install() {
    if $print_plan || ! command -v flock >/dev/null; then return; fi
    mkdir -p "$prefix"
    exec 9<"$prefix"
    flock --nonblock 9 && return
    say "another installation is under way; waiting for it"
    flock 9
}

install_all() {
    local started=$SECONDS
    say "[1/4] Python environment ${prefix#"$ROOT"/}"
    make_environment
    if ! $print_plan; then rm -f "$prefix/vtg_installed"; fi
    pip_install --upgrade pip # an old one shows no progress and misses newer kinds of wheels
    install_torch
    install_project
    check
    if $print_plan; then return; fi
    expected_stamp >"$prefix/vtg_installed.tmp"
    mv "$prefix/vtg_installed.tmp" "$prefix/vtg_installed"
    say "installed in $((SECONDS - started)) s"
}

main() {
    trap 'say "interrupted; run the same command again to go on"; exit 130' INT
    parse_options "$@"
    if [[ -n "${VTG_PYTHON:-}" ]]; then
        "$VTG_PYTHON" -c '' 2>/dev/null || fail "VTG_PYTHON=$VTG_PYTHON does not run"
        if $print_plan; then say "VTG_PYTHON=$VTG_PYTHON is used as it is; nothing will be installed"; fi
        if $print_python; then echo "$VTG_PYTHON"; fi
        return
    fi
    isolate
    local cuda
    cuda="$(driver_cuda)"
    choose_torch "$cuda"
    locate_environment
    log="$ROOT/outputs/logs/install.log"
    mkdir -p "$(dirname "$log")"
    if $print_plan || ! is_complete; then
        wait_for_other_install
        if $print_plan || ! is_complete; then install_all; fi
    fi
    if $flash_attn; then install_flash_attn; fi
    if $print_python; then echo "$python"; fi
}

main "$@"
