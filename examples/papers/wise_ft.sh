#!/usr/bin/env bash
# WiSE-FT (arXiv 2109.01903): finetune with a trained head, then interpolate with the zero-shot model, whose head is
# built from its own text tower; alpha by held-out digits and shifts of them.
source "$(dirname "$0")/start.sh"

tune "$out/ce.safetensors" $digits#val --base base.safetensors --train $digits#train --method ce --epochs 12
clipmerge interpolate base.safetensors "$out/ce.safetensors" --alphas 0:1:0.05 --eval id=$digits#val \
  --eval turned=$digits#val@rotate:25 --eval noisy=$digits#val@noise:0.3 "${scoring[@]}" \
  --plot "$out/curve.png" -o "$out/wise.safetensors"
clipmerge interpolate base.safetensors "$out/ce.safetensors" --alpha 0.5 --quiet -o "$out/half.safetensors"
clipmerge verify "$out/half.safetensors" --parents . --parents "$out" --quiet

report base.safetensors "$out"/{ce,half,wise}.safetensors -- id=$digits#test turned=$digits#test@rotate:25 \
  noisy=$digits#test@noise:0.3
published "alpha = 0.5 is better than the finetuned model under shift" "half on turned+noisy" ">" "ce on turned+noisy"
published "the chosen alpha is better than the finetuned model under shift" "wise on turned+noisy" ">" "ce on turned+noisy"
published "the chosen alpha is better than the base under shift" "wise on turned+noisy" ">" "base on turned+noisy"
published "and costs nothing in distribution" "wise on id" ">" "ce on id"
