"""Everything that says how good a result is."""
