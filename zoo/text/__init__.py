"""Text in: tokenizers, chat templates, the processor, batches."""
