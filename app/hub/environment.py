"""Variables of the environment that a process with network access is given."""

import os

NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "CURL_CA_BUNDLE")
"""Variables for how the network is reached; in either case of their letters."""
OF_PYTHON = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "SSL_CERT_FILE")


def network_variables() -> dict[str, str]:
    """Those of this process that say how the network is reached."""
    names = [name for wanted in NETWORK for name in (wanted, wanted.lower())]
    return {name: os.environ[name] for name in names if name in os.environ}


def child_variables() -> dict[str, str]:
    """All that a child which looks at the Hub gets: no database, broker, bucket or key is in it."""
    return {name: os.environ[name] for name in OF_PYTHON if name in os.environ} | network_variables()
