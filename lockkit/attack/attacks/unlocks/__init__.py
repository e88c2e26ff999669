"""Attacks that turn a lock into a model that is cheaper to train."""
