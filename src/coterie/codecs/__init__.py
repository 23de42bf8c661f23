"""How a matrix is stored: one file a way."""
