"""The configs that ship: Hydra finds them as `pkg://orbit.configs`. A folder of your own goes before (`--config-dir`)."""
