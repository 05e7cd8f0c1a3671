"""Bring your own trainer: record a trace inside its process (NumPy and safetensors are all that this needs)."""

from diptych.parity.foreign.recording import Recording as Recording
from diptych.parity.foreign.recording import Update as Update
from diptych.parity.foreign.recording import gradients_of as gradients_of
from diptych.parity.foreign.recording import weights_of as weights_of
