"""One module per attack or group of related attacks; registry.py collects their classes."""
