"""The tab "Subspace" of TensorBoard: its data, its server and its page.

TensorBoard imports this package when it starts, whatever it is started for. So nothing here imports torch, NumPy,
matplotlib or another room of this package; see README.md.
"""
