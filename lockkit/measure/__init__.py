"""How close two models are: each figure is defined once, for `lock`, `verify` and `attack`.

records.py   what is reported: `MeasuredText`, `Fidelity` (without PyTorch)
metrics.py   each figure as a plain function of logits
totals.py    the figures over many rows of text, in float64 sums and in chunks of logits
"""
