"""From a name or a config to a model and its processor."""
