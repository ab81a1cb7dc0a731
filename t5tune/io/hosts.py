"""Names and addresses of machines."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host name or an address means this machine and can't be reached from other machines."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
