#!/bin/sh
# Digits 5 to 9 with a network that knows 0 to 4, over 20 splits of the rows, each with a seed of its own: links of rank 1, 2, 4.
#
#   sh benchmarks/digits_splits/run.sh [FOLDER]
#
# from the repository's root: about an hour on a CPU core; a second call does what is missing, and one with an empty folder runs
# everything anew. The chain is the config's, ten links; in plateau-rank-1 a link ends where the validation loss has not fallen for
# two epochs. Rates are chosen by the validation accuracy of three seeds. LoRA and the chain come first, then the others. LoRA of
# the summed rank is there at rank 1 alone: the head's weight (10 x 64) has no rank of 20. Full fine-tuning has no rank either: its
# runs are done once, at rank 1, and are the same in the other tables.
set -e
export OMP_NUM_THREADS=1
folder=${1:-benchmarks/digits_splits}

compare() { # study, rank, methods, their rates, further options of a run
  study=$1 rank=$2 methods=$3 rates=$4
  shift 4
  cola compare --config configs/digits.yaml --output "$folder/$study" --metric val_accuracy --seeds 20 --tuning_seeds 3 \
    --also_seeded '[data.split_seed]' --methods "[$methods]" --learning_rates "{$rates}" \
    -- --model.rank "$rank" --model.alpha "$rank" "$@"
}

chain="1e-2, 2e-2, 4e-2"
half="2e-2, 4e-2, 8e-2, 16e-2, 1e-2, 32e-2" # of methods that train one factor
two="lora: [$chain], cola: [$chain]"
rest="full: [2e-3, 4e-3], rac: [$half]"
for rank in 4 1 2; do
  compare rank-$rank $rank "lora, cola" "$two"
done
compare rank-1 1 "lora, cola, lora-sum-rank, full, rac, relora, asymmetric" \
  "$two, lora-sum-rank: [1e-2, 2e-2], $rest, relora: [$chain], asymmetric: [$half]"
compare plateau-rank-1 1 cola "cola: [$chain]" --chain.every_n_epochs null --chain.patience 2
for rank in 4 2; do
  if ! grep -q '"method": "full"' "$folder/rank-$rank/results.jsonl"; then
    grep '"method": "full"' "$folder/rank-1/results.jsonl" >>"$folder/rank-$rank/results.jsonl"
  fi
  compare rank-$rank $rank "lora, cola, full, rac" "$two, $rest"
done
