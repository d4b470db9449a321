"""vLLM's plugin, which exports a task as a LoRA when a request first names it. See docs/how-to/serve-with-vllm.md."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

from ..errors import SubspaceError

if TYPE_CHECKING:
    from .exports import TaskExports

NAME = "subspace_peft"
TASKS, BASIS, CACHE, RANK = (f"SUBSPACE_PEFT_{word}" for word in ("TASKS", "BASIS", "EXPORTS", "RANK"))
logger = logging.getLogger(__name__)


def register() -> None:
    """Offer the tasks that `SUBSPACE_PEFT_TASKS` names to vLLM, which calls this in each of its processes.

    Without that variable, do nothing.

    Raises:
        SubspaceError: The variable names a file that does not exist, or `SUBSPACE_PEFT_RANK` is not a whole number.
    """
    tasks = os.environ.get(TASKS)
    if not tasks:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from .exports import TaskExports

    rank = os.environ.get(RANK)
    if rank is not None and not (rank.isdecimal() and int(rank) > 0):
        raise SubspaceError(f"{RANK}={rank!r}: give a whole number of at least 1, or leave it out.")
    exports = TaskExports(
        tasks,
        cache=os.environ.get(CACHE) or None,
        basis=os.environ.get(BASIS) or None,
        rank=None if rank is None else int(rank),
    )
    # vLLM runs this again in a process that has done it already
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, make_resolver(exports))


def make_resolver(exports: TaskExports) -> Any:
    """Make a `vllm.lora.resolver.LoRAResolver` of `exports`, for programs that register their own."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class SubspaceResolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            try:
                # an export takes a moment, in which the server goes on answering
                folder = await asyncio.to_thread(exports.find, lora_name, base_model_name)
            except (SubspaceError, OSError) as error:
                # vLLM answers 404 then; raised here it would be the server's own failure, and stop other resolvers
                logger.error("Task %r cannot be served: %s", lora_name, error)
                return None
            if folder is None:
                return None
            # the end of the folder's name is a hash of the content: another content is another adapter
            number = int(folder.name[-15:], 16) + 1
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(folder))

    return SubspaceResolver()
