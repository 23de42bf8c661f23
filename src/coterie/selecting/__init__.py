"""Which experts stay: clusters, criteria, guards, reconstruction."""
