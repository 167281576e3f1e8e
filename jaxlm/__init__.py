"""jaxlm: pure-functional JAX/Flax that makes language-model training fast.

Five types, and functions that make and wrap them: see `jaxlm.types`. `jaxlm.report`, which draws, is imported apart.
"""

from jaxlm import checkpoint as checkpoint
from jaxlm import compiled as compiled
from jaxlm import data as data
from jaxlm import distributed as distributed
from jaxlm import evaluate as evaluate
from jaxlm import files as files
from jaxlm import fingerprint as fingerprint
from jaxlm import fixed_order as fixed_order
from jaxlm import generate as generate
from jaxlm import grads as grads
from jaxlm import losses as losses
from jaxlm import metrics as metrics
from jaxlm import models as models
from jaxlm import optim as optim
from jaxlm import precision as precision
from jaxlm import range_test as range_test
from jaxlm import schedules as schedules
from jaxlm import sharding as sharding
from jaxlm import stages as stages
from jaxlm import train as train
from jaxlm import tree as tree
from jaxlm import verify as verify
from jaxlm import watchdog as watchdog
from jaxlm.types import Aux as Aux
from jaxlm.types import Batch as Batch
from jaxlm.types import GradFn as GradFn
from jaxlm.types import LossFn as LossFn
from jaxlm.types import Metrics as Metrics
from jaxlm.types import Params as Params
from jaxlm.types import Static as Static
from jaxlm.types import Step as Step
from jaxlm.types import TrainState as TrainState
