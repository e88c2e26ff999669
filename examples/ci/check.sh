#!/bin/sh
# Lock a model, export it, and hold the export to limits. Three commands; any of them stops the script.
#
#     MODEL=demo OUT=build sh check.sh
#
# Exit code 0: the export is the locked model, and close enough to the original. 1: a gate failed.
# 2: something could not be read, built or written. $OUT/verify.json holds all figures of the first two.
set -eu

MODEL=${MODEL:-demo}                                 # `demo`, a folder, or a Hub id
OUT=${OUT:-build}                                    # folder for locked/, onnx/ and verify.json
PRECISION=${PRECISION:-fp32}                         # of the exported weights
MAX_PERPLEXITY_RATIO=${MAX_PERPLEXITY_RATIO:-1.02}   # ONNX over the original
LOCK_OPTIONS=${LOCK_OPTIONS:-}                       # for instance: --depth 16 --data corpus.txt
VERIFY_OPTIONS=${VERIFY_OPTIONS:-}                   # for instance: --data corpus.txt --tokens 65536

mkdir -p "$OUT"

# shellcheck disable=SC2086 # options are meant to be split
lockkit lock "$MODEL" "$OUT/locked" --overwrite $LOCK_OPTIONS

lockkit export "$OUT/locked" "$OUT/onnx" --overwrite --precision "$PRECISION"

# Parity of ONNX and PyTorch keeps the limits of its precision; the ratio also bounds what the lock cost.
# shellcheck disable=SC2086
lockkit verify "$OUT/onnx" --reference "$MODEL" --reference "$OUT/locked" \
    --max-perplexity-ratio "$MAX_PERPLEXITY_RATIO" --json "$OUT/verify.json" $VERIFY_OPTIONS
