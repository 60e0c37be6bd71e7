#!/usr/bin/env bash
# CAR-FT (arXiv 2211.16175): cross-entropy that keeps the base's opinion about the context of an image; alone, and
# interpolated with the base.
source "$(dirname "$0")/start.sh"

for method in ce car-ft; do
  tune "$out/$method.safetensors" $digits#val --base base.safetensors --train $digits#train --epochs 12 --method $method
  clipmerge interpolate base.safetensors "$out/$method.safetensors" --alphas 0:1:0.1 --eval id=$digits#val \
    --eval turned=$digits#val@rotate:25 "${scoring[@]}" -o "$out/$method-wise.safetensors"
done

report base.safetensors "$out"/{ce,car-ft}{,-wise}.safetensors -- id=$digits#test turned=$digits#test@rotate:25 \
  noisy=$digits#test@noise:0.3
published "CAR-FT is better than cross-entropy in distribution" "car-ft on id" ">" "ce on id"
published "and under shift" "car-ft on turned+noisy" ">" "ce on turned+noisy"
published "interpolation helps CAR-FT further under shift" "car-ft-wise on turned+noisy" ">" "car-ft on turned+noisy"
