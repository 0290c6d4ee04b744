"""Files: safetensors, folders of weights, writing whole or not at all, number formats."""
