"""The parts of a layer with weights of their own, and what rotates and drops."""
