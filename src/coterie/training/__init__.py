"""Recovery: the light fine-tuning of what was condensed."""
