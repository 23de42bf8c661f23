"""The streaming forward: one layer of transformers at a time, one expert at a time."""
