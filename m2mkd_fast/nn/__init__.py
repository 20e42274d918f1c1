"""Layers with the published constructor arguments and state-dict names."""
