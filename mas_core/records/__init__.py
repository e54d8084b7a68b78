"""Trajectories remembered: what determines one, its record, training it to a round, its cost."""
