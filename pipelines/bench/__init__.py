"""``bigface bench``: speed and memory as ratios to a plain reference in the same run, since machines are noisy."""
