"""Ray's paragraphs about a lost worker in a few words."""

from __future__ import annotations

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

from ml2o_dist.metatrain.worker_loss import LONGEST_REASON, reason
from tests.wording import says

# As Ray 2.60 says it of an actor whose process got SIGKILL, and of one whose __init__ raised.
KILLED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RolloutWorker\n\tpid: 21243\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed."
)
# While its host is gone and Ray has not found so yet.
GONE = (
    "The actor f2a0b5f5508891814454728502000000 is unavailable: The actor is temporarily unavailable: RpcError: RPC "
    "error: Socket closed rpc_code: 14. The task may or may not have been executed on the actor."
)
RAISED = (
    "The actor died because of an error raised in its creation task, \x1b[36mray::Bad.__init__()\x1b[39m (pid=21547)\n"
    '  File "die.py", line 11, in __init__\nRuntimeError: its worker process has died, or so \x1b[31mit seems'
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RayActorError(None, KILLED), "process ... killed or crashed"),
        (RayActorError(None, RAISED, True), "RuntimeError: its worker process has died, or so it seems"),
        (RayActorError(None, "The actor is dead because its node has died. Node Id: 4f"), "node died"),
        (RayActorError(None, GONE), "not answer"),
        (NodeDiedError("anything"), "node died"),
        (OutOfMemoryError("anything"), "Ray ended ... out of memory"),
        (RayActorError(None, "dead\nit was killed by `ray.kill`."), "it was killed by `ray.kill`."),
        (RayActorError(None, "x" * 900), "x" * LONGEST_REASON + "..."),
        (RayActorError(None, " \n"), "RayActorError"),
    ],
)
def test_the_reason_is_one_short_line(error, words):
    found = reason(error)
    assert says(found, words)
    assert "\n" not in found
    assert len(found) <= LONGEST_REASON + len("...")
