"""``bigface bench``: speed and memory, as ratios to a plain reference in the same run (machines are noisy)."""
