"""The audit of a lock: attacks, their costs beside the original, and the figures that follow."""
