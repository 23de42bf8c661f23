"""The record that a kernel takes, field by field: for what compiles kernels, runs them and prepares their work."""

# Addresses of the code, of one packed matrix, of its inputs and outputs; the rows to do; words of the mask per row;
# float32 values from one output vector to the next. 64 bits each.
JOB = ("kernel", "mask", "values", "offsets", "scales", "x", "y", "first", "last", "words", "stride")
