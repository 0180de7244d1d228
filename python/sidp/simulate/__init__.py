"""Whole jobs in simulated time, on nodes that need not be at hand: `Setup`, `run`, and the paper's experiments beside it.

Events are native (csrc/sim) and call the product's own placement, fetch queue and mode policy. What feeds them is here.
"""
