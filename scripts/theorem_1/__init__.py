"""What `random_corruption_theory.py` is made of: a language model, a comparison with Theorem 1, and its table."""
