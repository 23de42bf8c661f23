"""Which weights inside an expert become zero. A rule is a file here with `score(weight, norms) -> scores`, one per
weight: the lowest of each output row go (`select.py`)."""
