"""What `benchmark_distributed.py` is made of: steps on ranks, what they send, and what that takes on a cluster."""
