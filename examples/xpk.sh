#!/usr/bin/env bash
# xpk, which makes and queues a JobSet on Google Kubernetes Engine; xpk's variables are read by --distributed.
#
#   CLUSTER=my-cluster IMAGE=gcr.io/my-project/sparse_jax examples/xpk.sh
#
# Needs: xpk with a cluster made by it, an image with this repository as its working directory, and a bucket mounted at /gcs for the workdir.
set -euo pipefail
xpk workload create --cluster "${CLUSTER:?the name of the cluster}" --workload sparse-jax --docker-image "${IMAGE:?an image with this repository}" \
  --tpu-type v5litepod-16 --num-slices 1 --max-restarts 50 \
  --command 'python launch.py --distributed --config=configs/cifar10_wrn_16_8.py --workdir=/gcs/runs/wrn --config.mesh.layout=fsdp'
