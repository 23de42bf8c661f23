"""One file per model family, or per group of families that agree; each defines `FAMILIES`."""
