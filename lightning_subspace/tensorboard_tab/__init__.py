"""The tab "Subspace" of TensorBoard: what a monitor writes for it, the server's part, and the page.

TensorBoard imports this package when it starts, whatever it is started for. So nothing here imports torch, NumPy,
matplotlib or another room of this package; see README.md.
"""
