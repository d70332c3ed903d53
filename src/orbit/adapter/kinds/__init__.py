"""What a layer of each kind computes under a task; `registry.py` says which kind a layer is of."""
