"""Sweeps: meta-trainings whose settings are drawn from a search space, as trials of Ray Tune."""
