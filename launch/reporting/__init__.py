"""What a run tells of itself, and whether it is sound."""
