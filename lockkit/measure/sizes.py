"""How many logits are in memory at a time. Imports no PyTorch."""

# Logits of one model in a chunk: 64 MB in float32. The head's weights are read once per chunk: with a vocabulary of
# 262,144 tokens and a quarter of this, figures took 1.8 times as long.
CHUNK_LOGITS = 16_000_000
# Logits of one model that figures are computed from at a time. A temporary in float64 has 8 MB. It stays in the
# processor's cache: with whole chunks, figures took four times as long.
PIECE_LOGITS = 1 << 20
