"""Reading checkpoints that may have been damaged or made by a stranger."""
