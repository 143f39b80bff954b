#!/usr/bin/env bash
# standardwebhooks 1.1.0: Webhook.sign takes an aware datetime and replaces its zone by UTC in place of converting it. One instant
# in two zones has two signatures, and of a sender whose clock speaks of anything but UTC every message is refused by the same
# library's verify, though secret, id, body and the seconds in webhook-timestamp are right.
#
# Needs a network and a minute. Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile standardwebhooks==1.1.0
cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import sys
from datetime import datetime, timedelta, timezone

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

webhook = Webhook("whsec_YW4gZXhhbXBsZSBvZiBhIHNlY3JldCBrZXkh")
body, now = '{"type": "job.succeeded"}', datetime.now(timezone.utc)
zones = {"UTC": timezone.utc, "UTC+05:30": timezone(timedelta(hours=5, minutes=30))}
print("standardwebhooks", importlib.metadata.version("standardwebhooks"))
seen = {}
for name, zone in zones.items():
    moment = now.astimezone(zone)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": webhook.sign("msg_1", moment, body),
    }
    try:
        webhook.verify(body, headers)
        seen[name] = "verified"
    except WebhookVerificationError as error:
        seen[name] = f"WebhookVerificationError: {error}"
    print(f"signed at an instant given in {name}, same seconds: {seen[name]}")
if seen != {"UTC": "verified", "UTC+05:30": "WebhookVerificationError: No matching signature found"}:
    sys.exit("the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"

# Seen on 2026-11-30:
#
#   standardwebhooks 1.1.0
#   signed at an instant given in UTC, same seconds: verified
#   signed at an instant given in UTC+05:30, same seconds: WebhookVerificationError: No matching signature found
