"""The refit compiler and the plan file."""
