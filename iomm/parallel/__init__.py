"""How the work is laid over ranks: the mesh, the layers of a backend, and the engine that steps the
weights."""
