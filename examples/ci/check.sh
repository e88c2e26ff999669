#!/bin/sh
# Locks a model, exports it, and verifies the export against limits. The script stops at the first command that fails.
#
#     MODEL=demo OUT=build sh check.sh
#
# Exit code 0: the export matches the locked model and is close enough to the original. 1: a gate failed. 2: any other
# error. $OUT/verify.json contains all figures if the exit code is 0 or 1.
set -eu

MODEL=${MODEL:-demo}                                 # `demo`, a folder, or a Hub id
OUT=${OUT:-build}                                    # folder for locked/, onnx/ and verify.json
PRECISION=${PRECISION:-fp32}                         # number format of the exported weights
MAX_PERPLEXITY_RATIO=${MAX_PERPLEXITY_RATIO:-1.02}   # perplexity of ONNX over the original's
LOCK_OPTIONS=${LOCK_OPTIONS:-}                       # for instance: --depth 16 --data corpus.txt
VERIFY_OPTIONS=${VERIFY_OPTIONS:-}                   # for instance: --data corpus.txt --tokens 65536

mkdir -p "$OUT"

# shellcheck disable=SC2086 # the options have to be split into words
lockkit lock "$MODEL" "$OUT/locked" --overwrite $LOCK_OPTIONS

lockkit export "$OUT/locked" "$OUT/onnx" --overwrite --precision "$PRECISION"

# The parity of ONNX and PyTorch has the default limits of the precision. The distance from the original to the locked
# model has default limits, too (--max-lock-kl, --min-lock-top1).
# shellcheck disable=SC2086
lockkit verify "$OUT/onnx" --reference "$MODEL" --reference "$OUT/locked" \
    --max-perplexity-ratio "$MAX_PERPLEXITY_RATIO" --json "$OUT/verify.json" $VERIFY_OPTIONS
