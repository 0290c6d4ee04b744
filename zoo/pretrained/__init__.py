"""Weights in installed packages and in GGUF files: found, converted once to folders of safetensors, read from these."""
