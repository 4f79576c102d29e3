"""What `gpu_checks.py` runs: checks of right results, of how steps run, and of what they cost."""
