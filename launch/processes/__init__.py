"""The processes of a run: how they start, agree, report an error once and stop."""
