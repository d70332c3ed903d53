"""Which tasks a model uses, and what each of its layers is told; `plan.py` is where to begin."""
