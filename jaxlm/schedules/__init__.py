"""Schedules: from the number of a step to a learning rate, a momentum, or whatever should change with it.

A schedule is optax's `step -> value`. Steps are integers, and integers they stay for as long as they are counted, so
values are as exact at step 2^31 - 1 as at step 1, and small at the end of a decay instead of rounded away. A boundary
belongs to what comes after it; beyond its last step a schedule keeps its last value. Steps may be Python's, NumPy's or
traced, one or an array of them; values have JAX's default float type, and finite gradients with respect to everything
but numbers of steps, which must be known.

Pieces are `(start, end, steps) -> schedule`: `linear`, `cosine`, `one_minus_sqrt`, `exponential`. Others take them as
values, and the algebra puts together what is missing here:

    warmup(cosine(3e-4, 0, 9_000), 1_000)
    sequence((triangular(1e-4, 1e-3, 500), 5_000), then=cosine(1e-3, 0, 5_000))
    cosine_restarts(peak=1e-3, first=1_000, multiple=2), cosine_restarts(peak=0.85, first=1_000, multiple=2, end=0.95)
"""

from jaxlm.schedules._compose import by_tokens as by_tokens
from jaxlm.schedules._compose import clipped as clipped
from jaxlm.schedules._compose import in_stages as in_stages
from jaxlm.schedules._compose import piecewise as piecewise
from jaxlm.schedules._compose import piecewise_constant as piecewise_constant
from jaxlm.schedules._compose import scaled as scaled
from jaxlm.schedules._compose import sequence as sequence
from jaxlm.schedules._compose import warmup as warmup
from jaxlm.schedules._cycles import cosine_restarts as cosine_restarts
from jaxlm.schedules._cycles import cyclic as cyclic
from jaxlm.schedules._cycles import exp_range as exp_range
from jaxlm.schedules._cycles import one_cycle as one_cycle
from jaxlm.schedules._cycles import triangular as triangular
from jaxlm.schedules._cycles import triangular2 as triangular2
from jaxlm.schedules._cycles import wsd as wsd
from jaxlm.schedules._plot import plot as plot
from jaxlm.schedules._shapes import Piece as Piece
from jaxlm.schedules._shapes import constant as constant
from jaxlm.schedules._shapes import cosine as cosine
from jaxlm.schedules._shapes import exponential as exponential
from jaxlm.schedules._shapes import inverse_sqrt as inverse_sqrt
from jaxlm.schedules._shapes import linear as linear
from jaxlm.schedules._shapes import one_minus_sqrt as one_minus_sqrt
from jaxlm.schedules._shapes import polynomial as polynomial
from jaxlm.schedules._shapes import power as power
from jaxlm.schedules._shapes import step_decay as step_decay
from jaxlm.schedules._steps import Schedule as Schedule
from jaxlm.schedules._steps import Value as Value
