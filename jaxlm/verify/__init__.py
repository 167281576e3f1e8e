"""Whether an experiment comes out the same however it is computed: the contract that this library keeps.

    contract = verify.Contract(
        model=functools.partial(models.transformer, config),  # with its options: -> (init, apply)
        loss=functools.partial(losses.next_token, z_loss=1e-4),  # of apply, with its options: -> LossFn
        optimizer=optax.chain(optim.clip_by_global_norm(1.0), optim.lion(1e-4)),
        batches=data.Batches(corpus, data.pack(corpus.lengths, [64], 2048), count=4),
        key=jax.random.key(0),
    )
    print(verify.HEADER)
    for result in verify.check(contract):
        print(result)
    print(verify.origin(contract))

A plain run, on one device and in whole batches, is compared with: microbatches; all devices, at each stage of ZeRO;
every document alone in a row, in rows of one length and of two; options of the loss and of the model that must change
nothing, such as cross-entropy in chunks, unrolled or rematerialized layers, and implementations of attention; a run
that was saved, stopped and resumed; float16 with a scaled loss. Of an own model or loss without such options say
`model_options={}`, `loss_options={}`, and `stacked=None` where it can't bring its layers together for stage 3; or name
its own options. Compiling takes most of the time, so a small model is as good as a large one.

Devices are what JAX has: `jax.config.update("jax_num_cpu_devices", 8)`, before anything else, simulates eight. Then
set the environment variable NPROC to 64 or so: they wait for each other in threads.
"""

from jaxlm.verify._check import HEADER as HEADER
from jaxlm.verify._check import Result as Result
from jaxlm.verify._check import check as check
from jaxlm.verify._check import origin as origin
from jaxlm.verify._contract import LOSS_OPTIONS as LOSS_OPTIONS
from jaxlm.verify._contract import MODEL_OPTIONS as MODEL_OPTIONS
from jaxlm.verify._contract import Contract as Contract
