"""What a checkpoint means: families, layers, experts, their computation, and loading into transformers."""
