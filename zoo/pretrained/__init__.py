"""Weights in installed packages and in GGUF files: found, converted once to a folder of safetensors, and read from it."""
