"""The processes of a run: how they start, agree, tell a mistake once and stop."""
