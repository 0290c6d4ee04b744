"""VLoRA: weights made from an image."""
