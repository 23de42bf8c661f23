"""Compression methods: pure functions on arrays and statistics, one small file each, named by their file."""
