"""Gamma checkpoints inside other programs. Nothing is imported here: each module needs its own program."""
