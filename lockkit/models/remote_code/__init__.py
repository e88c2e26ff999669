"""The modelling file that travels inside a locked checkpoint, and how it is written."""
