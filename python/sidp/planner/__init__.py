"""What a pool would bring on a node that need not be at hand: memory, KV cache, and when fetches are hidden.

`load_model`, `load_gpu` and `make_plan` are the whole of it; `sidp plan` prints what they find.
"""
