#!/bin/sh
# The peer of bench/lifecycle.py: a job's set-up and tear-down as a site would script them, after the source document's
# create and delete scripts. Rules, addresses and limits are those that acctd makes; no ledger, no last reading.
#
#   lifecycle.sh create|delete plain|lean
#
# plain: one ip command a change, and the link is gone when the script ends, as it must be for an exact last reading.
# lean: ip -batch, and the link's removal left to the end of the namespace, whenever the kernel gets to it.
#
# In the environment: JOB, IFNAME, OUTER4, INNER4, OUTER6, INNER6; INTERNAL4, INTERNAL6 (networks); CGROUPS (the
# directories) and SETTINGS (words: file, value, file, value...). The kernel's answers are checked by -e alone.
set -eu

filter() { # ICMP reject type, networks
    reject=$1
    shift
    echo '*filter'
    echo ":JOB_$JOB - [0:0]"
    echo "-A FORWARD -o $IFNAME -g JOB_$JOB"
    echo "-A FORWARD -i $IFNAME -g JOB_$JOB"
    for network in "$@"; do
        echo "-A JOB_$JOB -i $IFNAME -d $network -m comment --comment OutgoingInternal -j ACCEPT"
    done
    echo "-A JOB_$JOB -i $IFNAME -m comment --comment OutgoingExternal -j ACCEPT"
    for network in "$@"; do
        echo "-A JOB_$JOB -o $IFNAME -s $network -m state --state RELATED,ESTABLISHED -m comment --comment IncomingInternal -j ACCEPT"
    done
    echo "-A JOB_$JOB -o $IFNAME -m state --state RELATED,ESTABLISHED -m comment --comment IncomingExternal -j ACCEPT"
    echo "-A JOB_$JOB -j REJECT --reject-with $reject"
    echo COMMIT
}

unfilter() {
    printf '*filter\n-D FORWARD -o %s -g JOB_%s\n-D FORWARD -i %s -g JOB_%s\n-F JOB_%s\n-X JOB_%s\nCOMMIT\n' \
        "$IFNAME" "$JOB" "$IFNAME" "$JOB" "$JOB" "$JOB"
}

create_pipe_plain() {
    ip netns add "$JOB"
    ip link add "$IFNAME" type veth peer name eth0 netns "$JOB"
    ip link set "$IFNAME" up
    ip address add "$OUTER4/31" dev "$IFNAME"
    ip address add "$OUTER6/127" dev "$IFNAME" nodad
    ip -n "$JOB" link set lo up
    ip -n "$JOB" link set eth0 up
    ip -n "$JOB" address add "$INNER4/31" dev eth0
    ip -n "$JOB" address add "$INNER6/127" dev eth0 nodad
    ip -n "$JOB" route add default via "$OUTER4"
    ip -n "$JOB" route add ::/0 via "$OUTER6"
}

create_pipe_lean() {
    ip -batch - <<END
netns add $JOB
link add $IFNAME type veth peer name eth0 netns $JOB
link set $IFNAME up
address add $OUTER4/31 dev $IFNAME
address add $OUTER6/127 dev $IFNAME nodad
END
    ip -n "$JOB" -batch - <<END
link set lo up
link set eth0 up
address add $INNER4/31 dev eth0
address add $INNER6/127 dev eth0 nodad
route add default via $OUTER4
route add ::/0 via $OUTER6
END
}

limit() { # file, value, file, value...
    while [ $# -gt 0 ]; do
        echo "$2" >"$1"
        shift 2
    done
}

case $1 in
create)
    mkdir $CGROUPS
    limit $SETTINGS
    filter icmp-port-unreachable $INTERNAL4 | iptables-legacy-restore --noflush
    filter icmp6-port-unreachable $INTERNAL6 | ip6tables-legacy-restore --noflush
    "create_pipe_$2"
    ;;
delete)
    [ "$2" = lean ] || ip link delete "$IFNAME"
    ip netns delete "$JOB"
    unfilter | iptables-legacy-restore --noflush
    unfilter | ip6tables-legacy-restore --noflush
    rmdir $CGROUPS
    ;;
esac
