"""What a run takes on given hardware: formulas, a search over meshes, and real compilers."""
