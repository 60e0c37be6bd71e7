#!/usr/bin/env bash
# Task arithmetic (arXiv 2212.04089): task vectors of image towers finetuned under frozen zero-shot heads, added,
# negated, and put into an analogy.
source "$(dirname "$0")/start.sh"

frozen=(--base base.safetensors --method ce --head frozen --epochs 20)
tune "$out/low.safetensors" data/low.npz#val "${frozen[@]}" --train data/low.npz#train
tune "$out/high.safetensors" data/high.npz#val "${frozen[@]}" --train data/high.npz#train
tune "$out/low-blurred.safetensors" data/low.npz#val@blur:1 "${frozen[@]}" --train data/low.npz#train@blur:1

clipmerge add base.safetensors "$out"/{low,high}.safetensors --scale auto --val low=data/low.npz#val \
  --val high=data/high.npz#val "${scoring[@]}" -o "$out/both.safetensors"
clipmerge negate base.safetensors "$out/low.safetensors" --scale auto --target data/low.npz#val \
  --control data/high.npz#val "${scoring[@]}" -o "$out/forgot.safetensors"
clipmerge analogy base.safetensors --a "$out/low.safetensors" --b "$out/low-blurred.safetensors" \
  --c "$out/high.safetensors" --scale auto --val data/high.npz#val@blur:1 "${scoring[@]}" -o "$out/analogy.safetensors"

report base.safetensors "$out"/{low,high,both,forgot,analogy}.safetensors -- low=data/low.npz#test \
  high=data/high.npz#test blurred=data/high.npz#test@blur:1
published "the sum of two task vectors serves both tasks better than the base" "both on low+high" ">" "base on low+high"
published "and better than either finetuned model" "both on low+high" ">" "low on low+high"
published "negation forgets the target" "forgot on low" "<" "base on low"
published "an analogy improves a task of which it saw no image" "analogy on blurred" ">" "base on blurred"
published "also against the finetuned model of the nearest task" "analogy on blurred" ">" "high on blurred"
