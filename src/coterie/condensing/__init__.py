"""CD-MoE: which layers become dense, which experts stay on in them, and how that is written."""
