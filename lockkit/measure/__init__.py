"""How close two models are. `lock`, `verify` and `attack` use the same definition of each figure.

records.py   the records in a result: `MeasuredText`, `Fidelity` (imports no PyTorch)
metrics.py   each figure as a plain function of logits
totals.py    the figures over many rows of text: float64 sums, computed in chunks of logits
"""
