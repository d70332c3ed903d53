"""From the user's loader to the batch at hand: the order, this rank's share of it, and the workers that fetch it."""
