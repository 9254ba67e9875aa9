"""Finds the structure of an architecture: from the code of transformers, and from the source of vLLM."""
