"""Hugging Face models: families, loading whole or layer by layer, and the locked checkpoint."""
