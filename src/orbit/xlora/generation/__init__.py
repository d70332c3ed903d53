"""Text from a mixture: two caches behind one, which models can have them, and approximations."""
