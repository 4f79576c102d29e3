"""Which run this is: of which data, weights, settings and code, as values that a file can hold."""
