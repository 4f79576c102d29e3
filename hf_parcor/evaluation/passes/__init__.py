"""The passes over the data: gradients, what all corruptions have in common, and what need run only once."""
