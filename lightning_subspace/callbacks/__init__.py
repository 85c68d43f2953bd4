"""Callbacks of Lightning: when to probe, and what becomes of it."""
