"""Zeros that pay: matrices stored as a bitmask and their kept values, and multiplied without being expanded.

`format` says how (numpy only), `view` reads such a checkpoint as if it were dense, `kernels` multiplies, `experts` is
the MoE layer built on them, and `quantizer` registers all of it with transformers. `hook` makes that happen when
transformers is imported, whichever of the two came first. Importing this package imports none of them.
"""
