"""Plans: what may become of a checkpoint, one file per kind of change, and carrying it out."""
