"""The attention as a function: setup, calls, checks, selectors, and the flow of a pass."""
