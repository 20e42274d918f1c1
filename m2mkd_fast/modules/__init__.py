"""Modules: taking a model apart, and putting modules together."""
