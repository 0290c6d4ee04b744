"""Fewer image tokens: pruners before the LLM."""
