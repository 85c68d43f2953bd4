"""Processes that measure together, and how a flat vector is dealt to them."""
