"""The model half (`model`, `generation`, used by training and serving) and the trainers built on it.

Kept empty: importing `trainers` must not import a Trainer class.
"""
