"""Saving and restoring a run: its state, its place in the data, and what is needed to read its weights."""

from jaxlm.checkpoint._checkpoints import Checkpoints as Checkpoints
from jaxlm.checkpoint._reading import load_params as load_params
