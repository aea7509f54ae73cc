#!/usr/bin/env bash
# Wheels for a GPU machine without network (Python 3.12, with torch, cupy, numba and the like), into .gpu/ of the project
#     collect.sh [FOLDER of make_atlas.py]
set -euo pipefail
cd "$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)"
mkdir -p .gpu/whl
exclude=$(git rev-parse --git-path info/exclude)
grep -qx '/.gpu/' "$exclude" 2>/dev/null || { mkdir -p "$(dirname "$exclude")"; echo '/.gpu/' >>"$exclude"; }
cp "${1:-../shared/bench}/make_atlas.py" .gpu/
wheel() {
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 -d .gpu/whl "$@"
}
wheel anndata annbatch zarr zarrs numcodecs google-crc32c donfig dask distributed tornado zict tblib locket partd natsort \
  array-api-compat legacy-api-wrap session-info2 scverse-misc deflate humanfriendly msgspec pydantic pydantic-settings \
  annotated-types typing-inspection python-dotenv bokeh cryptography cffi pycparser py-spy
core=$(unzip -p .gpu/whl/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==//p' | head -1)
wheel "pydantic-core==${core%% *}"
ls .gpu/whl | wc -l
