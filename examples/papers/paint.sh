#!/usr/bin/env bash
# PAINT (arXiv 2208.05592): patch a task into the model at no cost for the tasks that it already knows; one task, and
# two of them jointly, one after the other, and with all coefficients searched together.
source "$(dirname "$0")/start.sh"

frozen=(--method ce --head frozen --epochs 20)
blurred=$digits#train@blur:1 noisy=$digits#train@noise:0.3
val=(--patch blurred=$digits#val@blur:1 --patch noisy=$digits#val@noise:0.3)
known=(--supported $digits#val@rotate:25 "${scoring[@]}")

tune "$out/blurred.safetensors" $digits#val@blur:1 --base base.safetensors --train "$blurred" "${frozen[@]}"
tune "$out/noisy.safetensors" $digits#val@noise:0.3 --base base.safetensors --train "$noisy" "${frozen[@]}"
clipmerge finetune "${training[@]}" "${frozen[@]}" --lr 0.001 --base base.safetensors --train blurred="$blurred" \
  --train noisy="$noisy" -o "$out/union.safetensors"

clipmerge patch base.safetensors "$out/blurred.safetensors" --patch $digits#val@blur:1 "${known[@]}" \
  --plot "$out/single.png" -o "$out/single.safetensors"
clipmerge patch base.safetensors "$out/union.safetensors" --mode joint "${val[@]}" "${known[@]}" -o "$out/joint.safetensors"
clipmerge patch base.safetensors "$out"/{blurred,noisy}.safetensors --mode parallel "${val[@]}" "${known[@]}" \
  -o "$out/parallel.safetensors"

# sequential: the second task is finetuned from the model that was patched with the first
tune "$out/then-noisy.safetensors" $digits#val@noise:0.3 --base "$out/single.safetensors" --train "$noisy" "${frozen[@]}"
clipmerge patch "$out"/{single,then-noisy}.safetensors "${val[@]}" --mode joint "${known[@]}" -o "$out/sequential.safetensors"

report base.safetensors "$out"/{blurred,single,joint,parallel,sequential}.safetensors -- known=$digits#test@rotate:25 \
  blurred=$digits#test@blur:1 noisy=$digits#test@noise:0.3
published "patching learns the task" "single on blurred" ">" "base on blurred"
published "and keeps more of what was known than finetuning" "single on known" ">" "blurred on known"
published "joint patching is at least as good as sequential" "joint on blurred+noisy+known" ">" "sequential on blurred+noisy+known"
published "sequential patching is at least as good as parallel" "sequential on blurred+noisy+known" ">" "parallel on blurred+noisy+known"
