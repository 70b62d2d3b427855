"""Whether the Hugging Face hub can be reached: asked once, and quickly, before a model is loaded from it.

huggingface_hub tries each file it has not got six times, with pauses of 23 seconds in all, and a model asks for many
files: behind a firewall an error takes minutes, and no setting shortens it. Loading itself is `trainers.model`.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path

from utils.common import UserError

TIMEOUT_VARIABLE = "HF_HUB_ETAG_TIMEOUT"
TIMEOUT_S = 5.0
"""How long the hub has to answer where `HF_HUB_ETAG_TIMEOUT`, huggingface_hub's own setting for that, is not set."""


def require_hub(name: str) -> None:
    """Make sure that the hub answers before `name` is loaded from it.

    Asks nothing for a folder, in offline mode (`HF_HUB_OFFLINE=1`) and for a model in the cache: those load without a
    hub. Any answer will do, an error or a proxy's login page too: loading explains those better.

    Raises UserError when no connection can be made, or none within the time limit.
    """
    from transformers.utils.hub import is_offline_mode

    if not (Path(name).expanduser().is_dir() or is_offline_mode() or _is_cached(name)):
        require_endpoint(
            repr(name), ", or give a downloaded folder instead of a hub name (model.name_or_path, --model_path)"
        )


def require_endpoint(what: str, otherwise: str = "") -> None:
    """Make sure that the hub answers at all. Raises UserError, naming `what` was to be loaded, when it does not."""
    from transformers.utils.hub import constants

    reason = _why_unreachable(constants.ENDPOINT)
    if reason:
        _why_unreachable.cache_clear()  # in a notebook the network may be mended before the next try
        raise UserError(
            f"cannot load {what}: {constants.ENDPOINT} cannot be reached ({reason}). Check the network, HF_ENDPOINT "
            f"and HTTPS_PROXY{otherwise}"
        )


def _is_cached(name: str) -> bool:
    """Whether some revision of the model's config.json was downloaded; without it nothing can be loaded."""
    from transformers.utils.hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    return any(folder.glob("snapshots/*/config.json"))


@cache
def _why_unreachable(endpoint: str) -> str:
    """Why no connection to `endpoint` can be made; "" when it answers.

    A thread, since looking up a name and trying each of its addresses have limits of their own, one after the other.
    """
    # transformers' names for them: which package httpx is changed between releases of huggingface_hub
    from transformers.utils.hub import get_session, httpx

    limit_s = float(os.environ.get(TIMEOUT_VARIABLE) or TIMEOUT_S)
    reasons = [f"no answer within {limit_s:g} s; {TIMEOUT_VARIABLE} sets how long to wait"]

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=limit_s, follow_redirects=False)
            reasons.append("")
        except httpx.TimeoutException:
            pass
        except (httpx.TransportError, httpx.InvalidURL) as error:
            reasons.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit_s)
    return reasons[-1]
