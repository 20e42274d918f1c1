"""Meeting others' work: which of timm's models can be split, released checkpoints, the hub, export.

A side room: it builds on models, modules and layers, and only the command line and the pipeline use it.
"""
