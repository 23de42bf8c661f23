"""From layers, statistics and a method to a decision."""
