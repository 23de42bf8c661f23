"""Bytes on disk: checkpoints read and written, copying, journals, and the record beside the weights."""
