"""Where numbers and images go: one interface (`tracker.py`) and the trackers behind it."""
