"""Training of the small parts that make decoding faster: a draft model, and later prompts, heads and adapters.

What all of them share: a plan that is frozen for the run (`plan.py`), rows of text computed from the step alone
(`text_windows.py`), one loop with resumable checkpoints (`loop.py`, `checkpoint.py`) and a picture of the loss
(`loss_curve.py`). What is trained, and against what, stands in a file of its own (`distillation.py`, `draft.py`).
Needs the packages of `pip install 'decodax[train]'`, which are imported when they are used.
"""
