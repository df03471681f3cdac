#!/usr/bin/env bash
# Several nodes over ssh, started once, on any of them. HOSTFILE is like launch/hostfile.example; the repository and its
# virtual environment lie at the same path on every node.
#
#     HOSTFILE=my_hosts bash launch/multi_node.sh --model bert-large-cased --data nyu-mll/glue --data-config rte
set -euo pipefail
cd "$(dirname "$0")/.."
exec deepspeed --hostfile "${HOSTFILE:?expected the path of a hostfile, see launch/hostfile.example}" \
    --master_port "${MASTER_PORT:-29500}" launch/finetune.py "$@"
