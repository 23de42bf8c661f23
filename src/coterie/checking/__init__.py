"""The checks of `coterie verify`: of files, of their contents, of loading, and of what is computed."""
