"""What a run keeps: its folder, the lock on it, checkpoints and their manifests."""
