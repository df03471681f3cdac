#!/usr/bin/env bash
# Several nodes over ssh, started once, on any of them. HOSTFILE is like launch/hostfile.example. The repository and its virtual
# environment are at the same path on every node. DeepSpeed starts the nodes with pdsh, and passes on the environment variables that
# ~/.deepspeed_env lists as NAME=VALUE.
#
#     HOSTFILE=my_hosts bash launch/multi_node.sh --model bert-large-cased --data nyu-mll/glue --data-config rte
set -euo pipefail
cd "$(dirname "$0")/.."
command -v pdsh > /dev/null || {
    echo "launch/multi_node.sh: expected pdsh, found none. Remedy: install it, or use launch/node_by_node.sh or launch/mpirun.sh." >&2
    exit 1
}
exec deepspeed --hostfile "${HOSTFILE:?expected the path of a hostfile, see launch/hostfile.example}" \
    --master_port "${MASTER_PORT:-29500}" launch/finetune.py "$@"
