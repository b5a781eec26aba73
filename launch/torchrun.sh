#!/usr/bin/env bash
# Train a card under torchrun. When a rank dies, all start again and go on from the newest whole checkpoint.
#
#   RANKS=4 launch/torchrun.sh CARD [--section.name value]...                            one node
#   NNODES=2 HEAD=10.0.0.1:29500 RANKS=4 launch/torchrun.sh CARD ...                     the same on each of two nodes
#
# RANKS: ranks a node (default 1; in all at most as many as blocks). NNODES: nodes (default 1). HEAD: address:port of one of the
# nodes, where they meet. NAME: the run's name (default: the card's file name): started again, a run goes on.
# MAX_RESTARTS: how often ranks are started again (default 3). GRACE: seconds that SIGTERM leaves them to save (default 300).
# For restarts, several nodes need the runs' folder on a disk that they share: any of them may be the next one that writes.
set -euo pipefail

die() { echo "error: $*" >&2 && exit 2; }

(($# > 0)) || die "no card; usage: [RANKS=4] [NNODES=2 HEAD=address:port] launch/torchrun.sh CARD [--section.name value]..."
nodes=${NNODES:-1} ranks=${RANKS:-1} name=${NAME:-$(basename "${1%.*}")}
train=(-m noprop_dist.train "$1" --run.name "$name" "${@:2}")

if ((nodes == 1)); then # nothing listens beyond the loopback interface: the agent meets itself at a file
    python "${train[@]}" --dry-run --ranks "$ranks" >/dev/null # tells a mistake once, not once a restart
    address=127.0.0.1 interface=lo endpoint=/dev/fd/3 store=store_type=file
    file=$(mktemp) && exec 3<>"$file" && rm "$file" # open here alone: nothing to tidy up, nothing for others to write to
else # by the route to the head: the hostname, which torchrun and gloo would go by, often means 127.0.0.1
    endpoint=${HEAD:-}
    [[ $endpoint == *:* ]] || die "NNODES is $nodes: set HEAD=address:port, one of the nodes, the same on all of them"
    head=$(getent ahostsv4 "${endpoint%:*}" | awk 'NR == 1 {print $1}') || die "HEAD: no host ${endpoint%:*} is known here"
    address=$(ip -o route get "$head" | sed 's/.* src \([^ ]*\).*/\1/') || die "HEAD: this node has no route to $head"
    interface=$(ip -o addr show to "$address" | awk 'NR == 1 {print $2}')
    store=is_host=$([[ $address == "$head" ]] && echo true || echo false)
fi

export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-300}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restart gets a new store: the old one's keys would mislead it
exec torchrun --nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts="${MAX_RESTARTS:-3}" --local-addr="$address" \
    --rdzv-backend=c10d --rdzv-id="$name" --rdzv-endpoint="$endpoint" --rdzv-conf="$store" "${train[@]}"
