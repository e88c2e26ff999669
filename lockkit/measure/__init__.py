"""How close two models are: perplexity, KL divergence, top-1 agreement, NMSE, each defined once."""
