"""Webhooks by the client and the command."""

import json
from pathlib import Path

import pytest

from bitwright.errors import Conflict, NotFound
from tests.bitwright.service import running_service
from tests.cli.processes import bitwright


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_the_clients_methods(tmp_path: Path, asynchronous: bool) -> None:
    with running_service(tmp_path, asynchronous=asynchronous) as service, service.client() as client:
        hooks = client.webhooks
        made = hooks.create("https://example.org/hooks", description="mine")
        assert made.secret.startswith("whsec_")
        assert [one.id for one in hooks.list()] == [made.id]
        assert hooks.retrieve(made.id).events == ["job.succeeded", "job.failed", "job.cancelled"]
        assert hooks.change(made.id, events=["job.failed"], enabled=False).disabled_why == "owner"
        with pytest.raises(Conflict, match="is off"):
            hooks.test(made.id)
        assert hooks.change(made.id, enabled=True).events == ["job.failed"]
        assert hooks.rotate(made.id).secret != made.secret
        sent = [hooks.test(made.id).id for _ in range(3)]
        assert [one.id for one in hooks.deliveries(made.id, limit=2)] == sent[::-1]
        assert hooks.delivery(made.id, sent[0]).log == []
        with pytest.raises(Conflict, match="still on its way"):
            hooks.replay(made.id, sent[0])
        hooks.delete(made.id)
        with pytest.raises(NotFound):
            hooks.retrieve(made.id)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    with running_service(tmp_path) as service:

        def run(*arguments: str) -> str:
            done = bitwright("webhooks", *arguments, "--url", service.url, "--key", service.key)
            assert done.returncode == 0, done.stderr
            return done.stdout

        webhook, secret = run("create", "https://example.org/hooks", "--event", "job.failed").split()
        assert secret.startswith("whsec_")
        assert run("list").split() == [webhook, "on", "https://example.org/hooks", "job.failed"]
        assert json.loads(run("list", "--json"))["id"] == webhook
        assert run("rotate", webhook).split()[1] != secret
        sent = run("test", webhook).strip()
        assert run("deliveries", webhook).split()[:3] == [sent, "pending", "webhook.test"]
        assert run("delivery", webhook, sent).startswith(f"{sent}\tpending\twebhook.test\tmsg_")
        assert "off (owner)" in run("switch", webhook, "--off")
        assert run("delete", webhook).split() == [webhook, "deleted"]
        assert run("list") == ""
