#!/usr/bin/env bash
# A Cloud TPU pod slice without Kubernetes: the same command on every worker, which find each other by themselves.
#
#   TPU=my-tpu ZONE=us-central2-b WORKDIR=/mnt/shared/runs/wrn examples/tpu_pod.sh
#
# Needs: gcloud, and on every worker this repository in ~/sparse_jax with its environment (make .venv/installed; pip install "jax[tpu]"), and
# WORKDIR on a file system that all workers share.
set -euo pipefail
gcloud compute tpus tpu-vm ssh "${TPU:?the name of the TPU}" --zone "${ZONE:?its zone}" --worker=all --command \
  "cd ~/sparse_jax && .venv/bin/python launch.py --distributed --config=configs/cifar10_wrn_16_8.py --workdir='${WORKDIR:?a shared folder}' --config.mesh.layout=fsdp"
