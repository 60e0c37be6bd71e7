#!/usr/bin/env bash
# FLYP (arXiv 2212.00638): finetune like you pretrain, against its rivals; the learning rate of each is chosen on
# held-out digits. Full data, and four images per class.
source "$(dirname "$0")/start.sh"

from=(--base base.safetensors --train $digits#train --epochs 12)
for method in flyp ce lp-ft; do
  tune "$out/$method.safetensors" $digits#val "${from[@]}" --method $method
  tune "$out/$method-few.safetensors" $digits#val --base base.safetensors --train $digits#train --method $method \
    --shots 4 --val $digits#val --steps 30 --score-every 5
done

report base.safetensors "$out"/{flyp,ce,lp-ft}{,-few}.safetensors -- id=$digits#test turned=$digits#test@rotate:25
published "FLYP is better than cross-entropy" "flyp on id" ">" "ce on id"
published "and than LP-FT" "flyp on id" ">" "lp-ft on id"
published "also under shift" "flyp on turned" ">" "ce on turned"
published "few-shot: FLYP is better than cross-entropy" "flyp-few on id" ">" "ce-few on id"
published "few-shot: FLYP is better than LP-FT" "flyp-few on id" ">" "lp-ft-few on id"
