"""What is attached to the LLM: LoRA, experts, VLoRA."""
