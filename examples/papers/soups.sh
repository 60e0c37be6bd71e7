#!/usr/bin/env bash
# Model soups (arXiv 2203.05482): random search over hyperparameters, then average what it left instead of choosing one.
source "$(dirname "$0")/start.sh"

cat > "$out/space.toml" <<'TOML'
[lr]
low = 3e-4
high = 4e-3
log = true

[wd]
low = 1e-4
high = 0.6
log = true

[epochs]
low = 8
high = 16
whole = true

[label_smoothing]
low = 0.0
high = 0.25
zero = 0.5

[augment]
choices = ["none", "crop:0.7", "randaugment:1,5"]
TOML
clipmerge sweep --base base.safetensors --train $digits#train --val $digits#val --space "$out/space.toml" \
  --trials 12 --method flyp --batch-size 64 --device cpu --seed "${SEED:-0}" --quiet -o "$out/runs"

clipmerge soup "$out"/runs/trial-*.safetensors --quiet -o "$out/uniform.safetensors"
clipmerge soup "$out"/runs/trial-*.safetensors --greedy --val $digits#val "${scoring[@]}" -o "$out/greedy.safetensors"
clipmerge soup "$out"/runs/trial-*.safetensors --learned --val $digits#val "${scoring[@]}" -o "$out/learned.safetensors"
clipmerge evaluate "$out"/runs/trial-*.safetensors --data val=$digits#val "${scoring[@]}" -o "$out/runs.json"
cp "$(python "$here/look.py" best "$out/runs.json" val)" "$out/best.safetensors"

report "$out"/{best,uniform,greedy,learned}.safetensors -- id=$digits#test turned=$digits#test@rotate:25 \
  noisy=$digits#test@noise:0.3
published "the greedy soup is better than the best single model" "greedy on id" ">" "best on id"
published "also under shift" "greedy on turned+noisy" ">" "best on turned+noisy"
published "the greedy soup is better than the uniform one" "greedy on id" ">" "uniform on id"
published "the learned soup is better than the greedy one" "learned on id" ">" "greedy on id"
