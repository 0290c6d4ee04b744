"""Image tokens of the encoder's width -> tokens of the LLM's."""
