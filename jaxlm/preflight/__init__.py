"""What a training step needs of memory, before it runs."""

from jaxlm.preflight._memory import MEMORY as MEMORY
from jaxlm.preflight._memory import Knob as Knob
from jaxlm.preflight._memory import Memory as Memory
from jaxlm.preflight._memory import compile_to_fit as compile_to_fit
from jaxlm.preflight._memory import explained as explained
from jaxlm.preflight._memory import memory as memory
