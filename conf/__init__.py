"""Named things as Hydra YAML: models, recipes, data. A component has no YAML: its dataclass is its option."""
