"""The bytes of every rule the legacy iptables back end writes: struct ipt_entry and ip6t_entry, matches, target.

Pure functions, no I/O. python-iptables' own Rule objects are not used, for three reasons, all seen with 1.2: for IPv6
they write interface masks of 0x01 where xtables wants 0xff, so that ac3f20 also matches ac1d20 and one job is billed
for another; making one loads mangle, raw and security into the namespace; and a rule costs 300 us instead of 5.
Kernel sources: include/uapi/linux/netfilter/x_tables.h, xt_conntrack.h, xt_comment.h, netfilter_ipv4/ipt_REJECT.h.
"""

import struct

from acctd.kernel.xtables import V4, Family
from acctd.model import Network

STATE_REVISION = 3  # of the conntrack match, which knows `state` as its alias since Linux 2.6.38
EXTENSIONS = (("match", "conntrack", STATE_REVISION), ("match", "comment", 0), ("target", "REJECT", 0))
NAT_EXTENSIONS = (("target", "MASQUERADE", 0),)

_HEAD = struct.Struct("=H29sB")  # xt_entry_match and xt_entry_target: size, name, revision
_IFNAMSIZ = 16
_COMMENT_MAX = 256
_INV_VIA_OUT = 0x02

# xt_conntrack_mtinfo3: 128 bytes of addresses, 18 of expiry, protocol and ports; then match_flags, invert_flags,
# state_mask; status and port ranges, padded to 168. Flags: bit 0 asks for the state, bit 13 shows it as -m state.
_STATE = 1 << 0 | 1 << 13
_ESTABLISHED, _RELATED = 1 << 1, 1 << 2
_STATE_MATCH = _HEAD.pack(200, b"conntrack", STATE_REVISION) + struct.pack(
    "=128x18x3H16x", _STATE, 0, _ESTABLISHED | _RELATED
)
_REJECT = {4: 3, 6: 4}  # icmp-port-unreachable, icmp6-port-unreachable


def state_match() -> bytes:
    """`-m state --state RELATED,ESTABLISHED`"""
    return _STATE_MATCH


def comment_match(text: str) -> bytes:
    """`-m comment --comment TEXT`. TEXT is a rule name of ours, far below xtables' 255 bytes."""
    return _HEAD.pack(32 + _COMMENT_MAX, b"comment", 0) + text.encode().ljust(_COMMENT_MAX, b"\0")


def verdict(name: str) -> bytes:
    """`-j ACCEPT`, or `-j CHAIN`, `-g CHAIN`: libiptc turns the name into the verdict or the jump."""
    return _HEAD.pack(40, name.encode(), 0) + bytes(8)


def reject(family: Family) -> bytes:
    """`-j REJECT` with the family's port-unreachable."""
    return _HEAD.pack(40, b"REJECT", 0) + struct.pack("=I4x", _REJECT[family.version])


def masquerade(family: Family) -> bytes:
    """`-j MASQUERADE`. v4: nf_nat_ipv4_multi_range_compat with one range, v6: nf_nat_range; both unset."""
    data = struct.pack("=I20x", 1) if family.version == 4 else bytes(40)
    return _HEAD.pack(32 + len(data), b"MASQUERADE", 0) + data


def entry(
    family: Family,
    target: bytes,
    *,
    inward: str = "",
    outward: str = "",
    not_outward: bool = False,
    source: Network | None = None,
    destination: Network | None = None,
    matches: bytes = b"",
    goto: bool = False,
    packets: int = 0,
) -> bytes:
    """One whole rule. `inward` is -i, `outward` -o; a name that ends in + is a prefix, as for iptables.

    `packets` is what its counter starts with.
    """
    octets = 4 if family.version == 4 else 16
    networks = [network.network_address.packed if network else bytes(octets) for network in (source, destination)]
    masks = [network.netmask.packed if network else bytes(octets) for network in (source, destination)]
    names = [name.encode().ljust(_IFNAMSIZ, b"\0") for name in (inward, outward)]
    head = b"".join((*networks, *masks, *names, _mask(inward), _mask(outward)))
    invert = _INV_VIA_OUT if not_outward else 0
    if family is V4:
        head += struct.pack("=HBB4x", 0, 0x02 if goto else 0, invert)  # proto, flags, invflags; nfcache
    else:
        head += struct.pack("=HBBB3x4x", 0, 0, 0x04 if goto else 0, invert)  # proto, tos, flags, invflags; nfcache
    target_at = family.size + len(matches)
    head += struct.pack("=HH", target_at, target_at + len(target))
    counters = struct.pack("=QQ", packets, 0)
    return head.ljust(family.counters_at, b"\0") + counters + matches + target


def same(family: Family, one: bytes, other: bytes) -> bool:
    """Whether two entries' heads ask for the same packets: addresses, interfaces, flags, and the sizes that follow."""
    return head(family, one) == head(family, other)


def head(family: Family, rule: bytes) -> bytes:
    """What an entry asks for, and its sizes: all of it before the kernel's own marks and the counters."""
    return rule[: family.offsets_at + 4]


def interfaces(family: Family, head: bytes) -> tuple[str, str]:
    """-i and -o of an entry, as they stand there."""
    inward, outward = (head[at : at + _IFNAMSIZ] for at in (family.ifaces_at, family.ifaces_at + _IFNAMSIZ))
    return inward.split(b"\0", 1)[0].decode("ascii", "replace"), outward.split(b"\0", 1)[0].decode("ascii", "replace")


def interface(name: str) -> bytes:
    """An interface name as it stands in an entry."""
    return name.encode().ljust(_IFNAMSIZ, b"\0")


def _mask(name: str) -> bytes:
    """Every byte that counts is 0xff; a whole name's closing NUL counts too."""
    length = len(name) - 1 if name.endswith("+") else len(name) + bool(name)
    return (b"\xff" * length).ljust(_IFNAMSIZ, b"\0")
