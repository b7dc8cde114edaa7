"""What a run reports, and the checks that it is sound."""
