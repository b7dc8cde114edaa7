"""Attention of new tokens over a cache of earlier ones, on one rank.

The steps are those of ``nsa_dist.attention.flow``; here are what they read: the cache of a layer in
the layout of the operators, the plan of a step, and a selector that keeps compressed tokens.
"""
