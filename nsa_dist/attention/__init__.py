"""The attention as a function: what a call is, its checks, its steps."""
