"""The training loss as a pure function of parameters and a micro-batch."""
