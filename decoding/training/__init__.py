"""Trains the auxiliary weights that make decoding faster: draft models, Medusa heads, adapters, prompt embeddings.

All trainings share a plan that is frozen for the run (`plan.py`), rows of text computed from the step alone
(`text_windows.py`), one loop with resumable checkpoints (`loop.py`, `checkpoint.py`) and a picture of the loss
(`loss_curve.py`). What is trained, and against which loss, has its own file (`distillation.py`, `draft.py`).
Needs the packages of `pip install 'decodax[train]'`, which are imported when they are used.
"""
