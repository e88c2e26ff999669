"""Attacks that fine-tune a model: one module per method or group of related methods."""
