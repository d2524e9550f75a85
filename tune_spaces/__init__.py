"""Search spaces of Ray Tune, one module a method; they refer to fields through the config's classes."""
