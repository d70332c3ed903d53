"""What a run would take and how fast it is: memory, peak FLOP/s, trials that leave no trace."""
