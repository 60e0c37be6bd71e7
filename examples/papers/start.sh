# Read by every script beside this one: the demo's base and digits, one thread and the CPU, for the same bytes everywhere.
# Results go to clipmerge-demo/papers/NAME, anew each time.
set -euo pipefail
export OMP_NUM_THREADS=1
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
name="$(basename "$0" .sh)"
cd "${1:-clipmerge-demo}"
out="papers/$name"
rm -rf "$out" && mkdir -p "$out"

digits=data/digits.npz # 297 training, 400 held-out and 800 test digits
scoring=(--device cpu --quiet)
training=(--device cpu --quiet --batch-size 64 --augment none --seed "${SEED:-0}")

# tune OUT VAL OPTION...: one finetuning per learning rate; OUT becomes the one with the best score on held-out VAL
tune() {
  local file="$1" val="$2" lr
  shift 2
  for lr in 0.0003 0.001 0.003; do
    clipmerge finetune "${training[@]}" "$@" --lr "$lr" -o "${file%.safetensors}-lr$lr.safetensors"
  done
  clipmerge evaluate "${file%.safetensors}"-lr*.safetensors --data val="$val" "${scoring[@]}" -o "${file%.safetensors}.json"
  cp "$(python "$here/look.py" best "${file%.safetensors}.json" val)" "$file"
}

# report CKPT... -- DATA...: score on test images, looked at once, into scores.json
report() {
  local checkpoints=() data=()
  while [ "$1" != -- ]; do checkpoints+=("$1") && shift; done
  shift
  for one in "$@"; do data+=(--data "$one"); done
  clipmerge evaluate "${checkpoints[@]}" "${data[@]}" "${scoring[@]}" -o "$out/scores.json"
}

# published CLAIM LEFT '>' RIGHT: say whether an ordering of the paper is there, such as  "wise on shift" ">" "ft on shift"
published() {
  python "$here/look.py" order "$out/scores.json" "$@"
}
