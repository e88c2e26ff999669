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
DEPTH=${DEPTH:-32}                                   # blocks in each chain
DATA=${DATA:-auto}                                   # text to distil on
TOKENS=${TOKENS:-300000}                             # tokens of phase 1, for each layer
END_TO_END_TOKENS=${END_TO_END_TOKENS:-100000}       # tokens of phase 2
PRECISION=${PRECISION:-fp32}                         # of the exported weights
MAX_PERPLEXITY_RATIO=${MAX_PERPLEXITY_RATIO:-1.05}   # ONNX over the original
VERIFY_DATA=${VERIFY_DATA:-auto}                     # text to measure on; auto: DATA where lockkit finds it
VERIFY_TOKENS=${VERIFY_TOKENS:-16384}                # held-out tokens

mkdir -p "$OUT"

lockkit lock "$MODEL" "$OUT/locked" --overwrite \
    --depth "$DEPTH" --data "$DATA" --tokens "$TOKENS" --end-to-end-tokens "$END_TO_END_TOKENS"

lockkit export "$OUT/locked" "$OUT/onnx" --overwrite --precision "$PRECISION"

# Parity of ONNX and PyTorch keeps the limits of its precision; the ratio also bounds what the lock cost.
lockkit verify "$OUT/onnx" --reference "$MODEL" --reference "$OUT/locked" \
    --data "$VERIFY_DATA" --tokens "$VERIFY_TOKENS" --max-perplexity-ratio "$MAX_PERPLEXITY_RATIO" --json "$OUT/verify.json"
