"""Sizes of the steps of a lock, on which its memory and time depend. Imports no PyTorch."""

FIT_TOKENS = 32_768  # of phase 1, for least squares
CAPTURED_TOKENS = 16_384  # of the pilot, for least squares
MEASURED_TOKENS = 1_024  # of the pilot, on which each layer's KL is measured
ROWS_AT_ONCE = 128  # of sampled text
ROWS_IN_A_BATCH = 4  # of the meter
