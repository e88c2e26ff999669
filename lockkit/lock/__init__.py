"""The lock: distillation of every MLP into a chain, layer by layer and then end to end."""
