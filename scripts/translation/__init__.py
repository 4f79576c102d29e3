"""What `reproduce_translation.py` is made of: studies, their runs and records, and the tables of paper 2."""
