"""Safe reading of checkpoints that may be damaged or come from someone you do not trust."""
