"""Whether an experiment comes out the same however it is computed: the contract that this library keeps."""

from jaxlm.verify._check import HEADER as HEADER
from jaxlm.verify._check import Result as Result
from jaxlm.verify._check import check as check
from jaxlm.verify._check import origin as origin
from jaxlm.verify._contract import LOSS_OPTIONS as LOSS_OPTIONS
from jaxlm.verify._contract import MODEL_OPTIONS as MODEL_OPTIONS
from jaxlm.verify._contract import Contract as Contract
