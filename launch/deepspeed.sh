#!/usr/bin/env bash
# Fine-tune on the nodes of a hostfile with the deepspeed command. Arguments go to the train command:
#   bash launch/deepspeed.sh [--dry-run] run.yaml output=/shared/run
# LAUNCHER is pdsh (over ssh), openmpi, slurm (within an allocation), or no_ssh, where each node is given the command
# with its NODE_RANK. HOSTFILE lists the nodes, HEAD is the address of the first one, PORT the one it listens on.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/start.sh"

# A word as the nodes' bash and pdsh, which takes % for its own, read it whole, without spaces, which DeepSpeed would quote.
remote() {
  [[ $1 =~ ^[a-zA-Z0-9_./=:,@+-]+$ ]] && printf %s "$1" && return
  printf "$'%s'" "$(printf %s "$1" | od -An -v -tx1 | tr -d ' \n' | sed 's/../\\x&/g')"
}

hostfile=${HOSTFILE:-$here/hostfile}
head=${HEAD:-}
if [ -z "$head" ] && [ "${LAUNCHER:-}" = slurm ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # by whose order Slurm numbers its ranks
fi
head=${head:-$(awk 'NF && $1 !~ /^#/ { print $1; exit }' "$hostfile")}
port=${PORT:-29500}
# --force_multi: else a hostfile of one node starts ranks on this one, whatever its name.
command=(deepspeed --hostfile "$hostfile" --force_multi --no_local_rank --master_addr "$head" --master_port "$port")
case ${LAUNCHER:=pdsh} in
  pdsh)
    command+=(--launcher pdsh)
    words=()
    for word in "$@"; do words+=("$(remote "$word")"); done
    set -- ${words[@]+"${words[@]}"} # bash before 4.4 takes none for one that is not set
    ;;
  # DeepSpeed names eth0 itself where nobody names an interface. --bind-to none: else all threads of a rank share one core.
  openmpi)
    command+=(--launcher openmpi --no_ssh_check)
    command+=(--launcher_args "--bind-to none --mca btl_tcp_if_include ${INTERFACE:-eth0}")
    ;;
  slurm)
    # DeepSpeed's launcher for it tells ranks no address: srun hands on the environment. Nor how many go on a node.
    slots=$(awk 'NF && $1 !~ /^#/ { sub(/.*slots=/, ""); print $1; exit }' "$hostfile")
    command=(env MASTER_ADDR="$head" MASTER_PORT="$port" "${command[@]}" --launcher slurm --no_ssh_check)
    command+=(--launcher_args "--ntasks-per-node $slots")
    ;;
  no_ssh) command+=(--no_ssh --node_rank "${NODE_RANK:?set it to the place of this node in the hostfile, from 0}") ;;
  *)
    echo "LAUNCHER is $LAUNCHER: set it to pdsh, openmpi, slurm or no_ssh" >&2
    exit 2
    ;;
esac
start "${command[@]}" "$here/train.py" "$@"
