#!/usr/bin/env bash
# Model recycling (arXiv 2212.10445, Ratatouille): finetune on auxiliary tasks, then each result on the target from one
# shared probe of the base, and average; against the average of as many finetunings that all start from the base.
source "$(dirname "$0")/start.sh"

target=(--train $digits#train --method ce --lr 0.001 --epochs 12)
clipmerge finetune "${training[@]}" --base base.safetensors --train $digits#train --method linear-probe \
  -o "$out/probe.safetensors"
for task in low high blurred; do
  clipmerge finetune "${training[@]}" --base tasks/$task.safetensors --head "$out/probe.safetensors" "${target[@]}" \
    -o "$out/from-$task.safetensors"
done
for seed in 1 2 3; do
  clipmerge finetune "${training[@]}" --base base.safetensors --head "$out/probe.safetensors" "${target[@]}" \
    --seed $seed -o "$out/seed$seed.safetensors"
done
clipmerge soup "$out"/from-*.safetensors --quiet -o "$out/recycled.safetensors"
clipmerge soup "$out"/seed*.safetensors --quiet -o "$out/soup.safetensors"

report "$out"/{seed1,soup,recycled}.safetensors -- id=$digits#test turned=$digits#test@rotate:25 noisy=$digits#test@noise:0.3
published "a soup is better than one finetuning under shift" "soup on turned+noisy" ">" "seed1 on turned+noisy"
published "recycled models make a better one under shift" "recycled on turned+noisy" ">" "soup on turned+noisy"
