#!/bin/bash
# What a GPU gains, in one command: no network, random weights at real sizes, about five minutes on an H100.
#
#   tests/benchmarks/on_a_gpu.sh            # on one GPU (CUDA_VISIBLE_DEVICES says which)
#   tests/benchmarks/on_a_gpu.sh --quick    # tiny sizes, also on a CPU: does every line run?
#   tests/benchmarks/on_a_gpu.sh soups      # some of: flyp data candidates soups learned
#
# Parts have time limits of their own, and one that fails does not end the others. Environment: FOLDER, where 22 GB of
# candidates and 4 GB of pixels lie (kept; by default a new folder in TMPDIR that goes away); MODELS (72), IMAGES (26000),
# DTYPE (float16).
# What this is to show: a FLYP step at least 1.6 times as fast as open_clip's own at batch 512, and the greedy soup of
# 72 ViT-B/32 over 26,000 images in at most 120 s on one H100.

here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../../merge:$here/../../cli${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
device=cuda
quick=()
parts=()
for word in "$@"; do
    if [ "$word" = --quick ]; then quick=(--quick); else parts+=("$word"); fi
done
[ ${#parts[@]} = 0 ] && parts=(flyp data soups learned)
folder=${FOLDER:-$(mktemp -d)}
mkdir -p "$folder" || exit
trap '[ -n "$FOLDER" ] || rm -rf "$folder"' EXIT
export CLIPMERGE_CACHE="$folder/cache"

card='import torch, os
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", "· torch", torch.__version__, "·", os.cpu_count(), "cores")'
python3 -c "$card" | tee "$folder/card"
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    [ ${#quick[@]} = 0 ] && echo "this machine has no GPU that torch can use; --quick runs on a CPU" >&2 && exit 1
    device=cpu
fi

wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }

part() { # name, limit in seconds, arguments of python3
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo
    echo "## $name"
    timeout --kill-after=10 "$limit" python3 "$@" 2> >(tail -n 12 >&2)
    local code=$?
    [ $code = 0 ] || echo "| $name | did not end well (exit status $code, limit $limit s) |"
    echo "($((SECONDS - began)) s)"
}

soups() { part "$1" "$2" "$here/gpu_soups.py" "$folder" "${@:3}" --device $device --models "${MODELS:-72}" \
    --images "${IMAGES:-26000}" --dtype "${DTYPE:-float16}" "${quick[@]}"; }

steps=(--models ViT-B-32 --batch 512 --rounds 8 --settings iwildcam imagenet)
jpegs=(--models ViT-B-32)
if [ ${#quick[@]} = 1 ]; then
    soups "a tiny model" 60 model
    steps=(--models "$folder/quick.json" --batch 16 --rounds 1 --settings few)
    jpegs=(--models "$folder/quick.json")
fi
{
    wanted flyp && part "a FLYP step, ours against open_clip's" 100 "$here/flyp_step.py" --device $device --no-loader "${steps[@]}"
    if wanted candidates || wanted soups || wanted learned; then soups "candidates" 150 make; fi
    wanted soups && soups "greedy soup, and as published" 240 greedy published
    wanted learned && soups "learned soup" 100 learned
    wanted data && part "training from JPEGs" 100 "$here/flyp_step.py" --device $device --only-loader "${jpegs[@]}"
} | tee "$folder/report"
echo
echo "# Summary: $(cat "$folder/card")"
grep -E '^(\||ViT|/|  )' "$folder/report"
