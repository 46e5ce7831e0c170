#!/bin/sh
# Digits 5 to 9 with a network that knows 0 to 4, over 20 splits of the rows, each with a seed of its own: links of rank 1, 2, 4.
#
#   sh benchmarks/digits_splits/run.sh [FOLDER]
#
# from the repository's root: about 40 minutes on a CPU core; a second call does what is missing, and one with an empty folder runs
# everything anew. The chain is the config's, ten links. Rates are chosen by the validation accuracy of three seeds. LoRA and the
# chain come first, then the others. LoRA of the summed rank is there at rank 1 alone: the head's weight (10 x 64) has no rank of
# 20. Full fine-tuning has no rank either: its runs are done once, at rank 1, and are the same in the other tables.
set -e
export OMP_NUM_THREADS=1
folder=${1:-benchmarks/digits_splits}

compare() { # rank, methods, their rates
  cola compare --config configs/digits.yaml --output "$folder/rank-$1" --metric val_accuracy --seeds 20 --tuning_seeds 3 \
    --also_seeded '[data.split_seed]' --methods "[$2]" --learning_rates "{$3}" -- --model.rank "$1" --model.alpha "$1"
}

two="lora: [1e-2, 2e-2, 4e-2], cola: [1e-2, 2e-2, 4e-2]"
rest="full: [2e-3, 4e-3], rac: [2e-2, 4e-2]"
for rank in 4 1 2; do
  compare $rank "lora, cola" "$two"
done
compare 1 "lora, cola, lora-sum-rank, full, rac, boost" "$two, lora-sum-rank: [1e-2, 2e-2], $rest, boost: [1e-2, 2e-2, 4e-2]"
for rank in 4 2; do
  if ! grep -q '"method": "full"' "$folder/rank-$rank/results.jsonl"; then
    grep '"method": "full"' "$folder/rank-1/results.jsonl" >>"$folder/rank-$rank/results.jsonl"
  fi
  compare $rank "lora, cola, full, rac" "$two, $rest"
done
