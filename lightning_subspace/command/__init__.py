"""Command line: what runs have measured is shown, and what they have not is measured.

Nothing heavy is imported for the help, or to show TensorBoard's folders.
"""
