"""The configs that ship, `pkg://orbit.configs` to Hydra. A folder of your own goes before them (`--config-dir`)."""
