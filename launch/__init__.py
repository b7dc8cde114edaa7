"""Programs: training, conversion of checkpoints, benchmarks. Not part of the wheel.

Each program runs as a file from a checkout, installed or not: it puts the checkout's packages on
sys.path in the place of its own folder, so that no module here hides a library of the same name.
"""
