"""The template of the modelling file in a locked checkpoint."""
