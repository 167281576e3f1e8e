"""Models as pairs of pure functions, `(init, apply)`."""

from jaxlm.models import attention as attention
from jaxlm.models import masks as masks
from jaxlm.models.functional import functional as functional
from jaxlm.models.remat import remat as remat
from jaxlm.models.remat import remat_policy as remat_policy
from jaxlm.models.transformer import Cache as Cache
from jaxlm.models.transformer import Transformer as Transformer
from jaxlm.models.transformer import TransformerConfig as TransformerConfig
from jaxlm.models.transformer import empty_cache as empty_cache
from jaxlm.models.transformer import matrices as matrices
from jaxlm.models.transformer import stacked as stacked
from jaxlm.models.transformer import tensor_parallel as tensor_parallel
from jaxlm.models.transformer import transformer as transformer
