#!/usr/bin/env bash
# On the GPU machine, in the project's root, with .gpu (collect.sh): the tests of tests/gpu, then what a loader does there.
#     SCALE=1.0 STEPS="tests sanitizer kernels ncu bench train profile" check.sh      some of the steps; all by default
set -uo pipefail
exec > >(tee "${OUT:-/tmp}/log") 2>&1
out=${OUT:-/tmp} steps=" ${STEPS:-tests sanitizer kernels ncu bench train profile} " begun=$(date +%s)
wants() { [[ $steps == *" $1 "* ]]; }
said() { echo "== $1: after $(($(date +%s) - begun)) s"; }
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
nproc
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu/whl/*.whl || exit 1
export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1 NUMBA_CACHE_DIR=/tmp/numba
pytest=(python3 -m pytest -q --timeout 120 -o addopts= -p no:cacheprovider --import-mode=importlib -W ignore)
atlas=
if [[ $steps =~ bench|train|profile ]]; then  # beside the tests
  { python3 .gpu/make_atlas.py /tmp/atlas --scale "${SCALE:-1.0}" --compression none &&
    python3 benchmarks/gpu/loaders.py /tmp/atlas --build-only; } >"$out/atlas" 2>&1 & atlas=$!
fi
if wants tests; then
  timeout 120 "${pytest[@]}" tests/gpu -n 6 -k "not thousand" 2>&1 | tail -40
  timeout 60 "${pytest[@]}" tests/gpu -k thousand 2>&1 | tail -5  # alone: it looks at all of the card's memory
  said tests
fi
[ -z "$atlas" ] || { wait $atlas; cat "$out/atlas"; said atlas; }
if wants kernels; then timeout 60 python3 benchmarks/gpu/kernels.py; said kernels; fi
if wants bench; then timeout 200 python3 benchmarks/gpu/loaders.py /tmp/atlas; said bench; fi
if wants train; then timeout 60 python3 benchmarks/gpu/train.py /tmp/atlas; said train; fi
if wants sanitizer; then
  timeout 100 compute-sanitizer --tool memcheck --error-exitcode 9 "${pytest[@]}" tests/gpu -k "normalises and csr and torch or damaged" 2>&1 | tail -15
  said sanitizer
fi
if wants ncu; then
  timeout 60 ncu --clock-control none -k regex:densify -s 20 -c 2 --metrics \
    gpu__time_duration.sum,dram__bytes_write.sum,dram__bytes_read.sum,lts__t_bytes.sum,sm__warps_active.avg.pct_of_peak_sustained_active \
    python3 benchmarks/gpu/kernels.py --first 2>&1 | tail -25
  said ncu
fi
if wants profile; then
  python3 benchmarks/gpu/loaders.py /tmp/atlas --of open --seconds 9 >"$out/watched" & busy=$!
  until grep -q now "$out/watched" || ! kill -0 $busy 2>/dev/null; do sleep 0.2; done  # imports and compilations are over
  timeout 20 /tmp/site/bin/py-spy record --gil -t -r 400 -d 4 -f raw -o "$out/gil.txt" --pid $busy
  timeout 20 /tmp/site/bin/py-spy record -t -r 200 -d 3 -f raw -o "$out/all.txt" --pid $busy
  wait $busy; cat "$out/watched"; said profile
fi
