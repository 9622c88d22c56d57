"""The numbers of an expert: solver, packing, records, matrix products. No processes, no sockets."""
