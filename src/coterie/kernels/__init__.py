"""Machine code for products of few tokens with packed weights."""
