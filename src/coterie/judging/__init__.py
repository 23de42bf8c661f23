"""How models are judged beside perplexity: in pairs, against plain rounding, by speed, on the tasks of the harness."""
