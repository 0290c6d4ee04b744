"""Pruners between the layers of the LLM."""
