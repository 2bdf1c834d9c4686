"""What operators are built from: the specification, the choice of a backend, and the glue to each backend."""
