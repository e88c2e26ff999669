"""One module per attack or group of related attacks, sorted by kind; registry.py collects their classes."""
