"""Meshes, and how parameters, optimizer state and batches lie on them."""

from jaxlm.sharding._describe import Description as Description
from jaxlm.sharding._describe import Transfer as Transfer
from jaxlm.sharding._describe import describe as describe
from jaxlm.sharding._layout import Layout as Layout
from jaxlm.sharding._layout import lay_out as lay_out
from jaxlm.sharding._layout import undivided as undivided
from jaxlm.sharding._mesh import MODEL as MODEL
from jaxlm.sharding._mesh import by_rows as by_rows
from jaxlm.sharding._mesh import data_axes as data_axes
from jaxlm.sharding._mesh import mesh as mesh
from jaxlm.sharding._mesh import place as place
from jaxlm.sharding._mesh import replicated as replicated
from jaxlm.sharding._mesh import row_axes as row_axes
from jaxlm.sharding._mesh import share as share
from jaxlm.sharding._mesh import to_host as to_host
