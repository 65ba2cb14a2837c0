"""The same model behind other servers: each file is what its documentation shows, no more."""
