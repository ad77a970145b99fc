"""Addresses that a user names, and the passwords and keys that must not be saved or printed with them."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from mmsr.system.errors import UserError

# Parts of an address: user name and password before the host (a password may hold a slash), parameters that are named
# like keys, and words that begin like the keys of well-known services.
CREDENTIALS = re.compile(
    r"(?<=://)[^/?#\s]*(?=@)"
    r"|(?<=://)[^/\s:\[]*:(?!\d*(?:[/?#\s]|$))\S*(?=@)"
    r"|(?<=[?&;#])(?:[\w.-]*(?:key|token|secret|password|passwd|passphrase|signature|credentials?|authorization)"
    r"|sig|pwd|pass|auth|bearer|code|jwt|sas|sk|ak)=[^&;#\s]+"
    r"|\b(?:sk-|hf_|gh[opsu]_|github_pat_|xox[bp]-|AIza|jina_|tvly-)[\w-]{16,}",
    re.IGNORECASE,
)


def hidden(text: str) -> str:
    """The text without the passwords and keys in its addresses."""
    return CREDENTIALS.sub("[key]", text)


def refuse_credentials(where: str, address: str, variable: str) -> None:
    """Raises UserError where an address holds a password or key, which belongs in the environment's `variable`."""
    address = "".join(address.split())  # a password may hold a blank
    if "://" not in address:
        address = f"http://{address.lstrip('/')}"
    if CREDENTIALS.search(address) or CREDENTIALS.search(unquote(address)):
        advice = f"leave it out and export {variable}" if variable else "leave it out"
        raise UserError(f"{where}: the address holds a password or a key, and would be saved with the run: {advice}")


def server_address(address: str, given: str, variable: str = "") -> str:
    """The address of a server that a user names, without blanks around it. Only its form is checked.

    `given`: the option before it, as in "--judge ". Raises UserError unless it is http:// or https:// and a host, and
    for an address with a password or key, which belongs in the environment's `variable`.
    """
    address = address.strip()
    refuse_credentials(given.rstrip(" :="), address, variable)
    try:
        parts = urlsplit(address)
        host = re.fullmatch(r"[\w.:%-]+", parts.hostname or "")
        sound = parts.scheme in ("http", "https") and host and parts.port != 0
    except ValueError:  # a wrong port, or wrong brackets
        sound = False
    if not sound or " " in address or not address.isprintable():
        raise UserError(f"{given}{repr(address)[1:-1]}: no address of a server; give one such as http://127.0.0.1:8000")
    return address
