"""Command line, for after a run: show, measure, and describe a machine.

Nothing heavy is imported for the help, or to show TensorBoard's folders.
"""
