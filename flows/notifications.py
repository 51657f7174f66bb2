"""Messages to people: webhooks and e-mails, which the Prefect server sends for failed runs and promotions.

`DOMAINSTUDIO_NOTIFY` holds addresses as Apprise writes them, separated by spaces or lines:

    jsons://hooks.example/domainstudio                                  a webhook, which gets JSON
    mailtos://user:password@mail.example?from=studio@example&to=ada@example

Chats have addresses of their own. The server keeps them encrypted, in a block.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING
from uuid import UUID

from domainstudio.errors import ConfigError

if TYPE_CHECKING:
    from prefect.events.schemas.automations import AutomationCore

VARIABLE = "DOMAINSTUDIO_NOTIFY"
BLOCK = "domainstudio"
"""Name of the block."""
FAILED = ("prefect.flow-run.Failed", "prefect.flow-run.Crashed")
PROMOTED = ("domainstudio.model.promoted",)
_RUN = (
    "{{ flow.name }}: run {{ flow_run.name }} {{ flow_run.state.name | lower }}",
    "{{ flow_run.state.message }}\n\nFlow run: {{ (flow_run | ui_url) or flow_run.id }}",
)
_MODEL = (
    "{{ event.resource.name }}: version {{ event.payload.version }} is the champion",
    "Before: {{ event.payload.previous or 'none' }}. {{ event.payload.reason }}",
)


def block(environment: Mapping[str, str] = os.environ) -> UUID | None:
    """Keep the addresses of `DOMAINSTUDIO_NOTIFY` in the server's block; return its id, None without any.

    Raises:
        ConfigError: Apprise does not know an address. The message shows no address: they hold passwords.
    """
    from apprise import Apprise
    from prefect.blocks.notifications import SlackWebhook
    from pydantic import SecretStr

    addresses = environment.get(VARIABLE, "").split()
    for number, address in enumerate(addresses, 1):
        if not Apprise().add(address):
            kind = address.partition("://")[0] if "://" in address else "no scheme"
            raise ConfigError(
                f"{VARIABLE}: address {number} ({kind}) is not one that Apprise knows: correct it"
            )
    if not addresses:
        return None
    # Prefect's server has no block for any address of Apprise. This one hands on all that is not Slack's.
    made = SlackWebhook(url=SecretStr(" ".join(addresses)))
    return UUID(str(made.save(BLOCK, overwrite=True)))


def automations(block: UUID, related: Mapping[str, str | list[str]]) -> list[AutomationCore]:
    """Return what sends a message for each failed or crashed run, and for each promotion.

    Args:
        block: Id of the notification block.
        related: What events of this project's flows are related to.
    """
    return [
        _automation("tell of failed runs", FAILED, "prefect.flow-run.*", related, _RUN, block),
        _automation("tell of promotions", PROMOTED, "domainstudio.model.*", {}, _MODEL, block),
    ]


def _automation(
    name: str,
    events: tuple[str, ...],
    about: str,
    related: Mapping[str, str | list[str]],
    message: tuple[str, str],
    block: UUID,
) -> AutomationCore:
    from prefect.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.actions import SendNotification

    subject, body = message
    return AutomationCore(
        name=f"domainstudio: {name}",
        trigger=EventTrigger(
            expect={*events},
            match={"prefect.resource.id": [about]},
            match_related=dict(related),
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[SendNotification(block_document_id=block, subject=subject, body=body)],
    )
