"""Block-sparse attention: selection of blocks, and the backends that read them."""
