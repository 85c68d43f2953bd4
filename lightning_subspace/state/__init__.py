"""Python state: what can hold it, how to copy it, random generators."""
