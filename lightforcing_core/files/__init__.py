"""Files that are either complete or absent: outputs, tensors, videos."""
