"""Predictions and scores, and the two evaluation suites that take our models."""
