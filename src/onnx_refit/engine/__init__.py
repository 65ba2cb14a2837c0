"""Backends behind one small protocol."""
