"""Statistics of a collection's genes, and what is worked out of them: variable genes, sums by group of cells."""
