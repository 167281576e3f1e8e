#!/bin/bash
# Trains on a Cloud TPU slice, one process on each of its machines; JAX finds them by itself.
# Edit: TPU and ZONE, here or in the environment. On every machine: the repository in ~/jaxlm, set up by
# `make setup ACCELERATOR=tpu`, with runs/ a folder that all machines share, as a mounted Filestore or bucket.
# Start: experiments/launch/tpu_vm.sh --name big --steps 100000
set -euo pipefail
TPU=${TPU:-pretrain}
ZONE=${ZONE:-us-central2-b}

command="cd ~/jaxlm && .venv/bin/python experiments/pretrain.py"
for option in "$@"; do
  command+=" $(printf %q "$option")"
done
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
