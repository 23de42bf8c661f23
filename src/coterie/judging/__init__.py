"""How models are judged beside perplexity: in pairs, against plain rounding, on the tasks of the harness."""
