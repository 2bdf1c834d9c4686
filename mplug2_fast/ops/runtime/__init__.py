"""What every operator is built from: its specification, the choice of a backend, and how each backend is called."""
