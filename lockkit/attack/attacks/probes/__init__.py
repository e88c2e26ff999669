"""Attacks that measure something and train nothing."""
