#!/usr/bin/env bash
# Several nodes without ssh: the same command on every node, except for NODE_RANK. For Kubernetes, or by hand.
#
#     HOSTFILE=my_hosts NODE_RANK=0 MASTER_ADDR=node-0 bash launch/node_by_node.sh --epochs 3      # on the first node
#     HOSTFILE=my_hosts NODE_RANK=1 MASTER_ADDR=node-0 bash launch/node_by_node.sh --epochs 3      # on the second
set -euo pipefail
cd "$(dirname "$0")/.."
exec deepspeed --hostfile "${HOSTFILE:?expected the path of a hostfile, see launch/hostfile.example}" \
    --no_ssh --node_rank "${NODE_RANK:?expected the place of this node in the hostfile, from 0}" \
    --master_addr "${MASTER_ADDR:?expected the name or address of the first node}" --master_port "${MASTER_PORT:-29500}" \
    launch/finetune.py "$@"
