"""A folder onto the Hugging Face hub: who is asking, the repository, the upload; patient with a server that stumbles.

The upload itself, its parallel and resumed parts, is `huggingface_hub`'s `upload_folder`: the same call again goes on
where the last one stopped. What is in the folder is `inference.export`'s matter. The token is found by huggingface_hub
(`HF_TOKEN`, or `hf auth login`); it is never taken as an argument, printed or written.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from utils.common import UserError
from utils.hub import require_endpoint
from utils.logging_utils import get_logger

WAITS_S: tuple[float, ...] = (2.0, 10.0, 30.0)
"""Pauses before a call is tried again after a server error; huggingface_hub has shorter ones of its own inside."""

_PASSING = (408, 429)
"""Statuses below 500 that pass by themselves."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", "adapter_config.json", ".safetensors.index.json")

Result = TypeVar("Result")


def require_account(repo_id: str) -> str:
    """The full name `owner/name` of `repo_id` for the account of the stored token. Nothing is created or sent.

    Call it before the work: raises UserError when there is no token, the hub refuses it or cannot be reached, the
    token may only read, or `repo_id` is no name for a repository.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    from transformers.utils.hub import is_offline_mode

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo_id {repo_id!r} is no name for a repository (owner/name): {error}") from error
    if get_token() is None:
        raise UserError(
            "--push_to_hub true needs a token that may write: run `hf auth login`, or set HF_TOKEN "
            "(https://huggingface.co/settings/tokens)"
        )
    if is_offline_mode():
        raise UserError("--push_to_hub true, but HF_HUB_OFFLINE is set; unset it")
    require_endpoint("the account that --push_to_hub writes to")
    account = _patiently("asking the hub who this token belongs to", HfApi().whoami)
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"the token of {account['name']} may only read. Make one that may write "
            "(https://huggingface.co/settings/tokens), then run `hf auth login` or set HF_TOKEN"
        )
    return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"


def push_folder(folder: Path, repo_id: str, *, private: bool | None, message: str) -> str:
    """Upload every file of `folder` to the model repository `repo_id`, making it if need be. Returns its address.

    `private` decides about a new repository only; None leaves it to the account's default. Files of other names that
    the repository holds stay. An upload that was interrupted goes on when the same call is made again.

    Raises UserError when the hub refuses (token, rights, name), keeps failing, when a repository that should be private
    is public, and when it holds weights that the folder does not replace.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    again = f". {folder} is complete; the same command again goes on with the upload"
    info = _existing(api, repo_id, again)
    if info is None:
        _patiently(f"making {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True), again)
    else:
        _check_existing(info, repo_id, folder, private)

    def send() -> Any:
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)

    commit = _patiently(f"uploading to {repo_id}", send, again)
    get_logger().info("committed %s", commit.oid)
    return f"{api.endpoint}/{repo_id}"


def _existing(api: Any, repo_id: str, again: str) -> Any:
    """What the hub knows of `repo_id`; None where it has none."""
    from huggingface_hub.errors import HfHubHTTPError

    def ask() -> Any:
        try:
            return api.model_info(repo_id)
        except HfHubHTTPError as error:
            if error.response.status_code == 404:
                return None
            raise

    return _patiently(f"asking for {repo_id}", ask, again)


def _check_existing(info: Any, repo_id: str, folder: Path, private: bool | None) -> None:
    if private and not info.private:
        raise UserError(
            f"--private, but {repo_id} exists and is public. Make it private in its settings, or choose another "
            "--repo_id; nothing was sent"
        )
    ours = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    others = [file.rfilename for file in info.siblings or () if file.rfilename.endswith(_WEIGHTS)]
    if left := sorted(set(others) - ours):
        raise UserError(
            f"{repo_id} holds weights that this export does not replace ({', '.join(left[:3])}"
            f"{', ...' if len(left) > 3 else ''}), and loading would mix them up. Choose another --repo_id, or delete "
            "those files there; nothing was sent"
        )
    get_logger().info("%s exists: its files of the same names are replaced", repo_id)


# ---------------------------------------------------------------------------------------------- patience
def _patiently(what: str, call: Callable[[], Result], after: str = "") -> Result:
    """`call()`, made again after each of `WAITS_S` while the server or the network fails.

    Raises UserError with the hub's reason, and `after`, when it refuses or fails to the end.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # transformers' name for it: which package httpx is changed between releases of huggingface_hub
    from transformers.utils.hub import httpx

    for wait_s in (*WAITS_S, None):
        try:
            return call()
        except (HfHubHTTPError, httpx.TransportError, OSError, RuntimeError, ValueError) as error:
            # The library wraps what happened to one file in RuntimeError, reads error pages as JSON (ValueError), and
            # Xet's faults are OSErrors.
            status = _status(error)
            if wait_s is None or not _passes(error, status):
                raise UserError(f"{what}: {_reason(error, status)}{after}") from None  # the cause may show the token
            get_logger().warning("%s: %s; again in %g s", what, _short(error, status), wait_s)
        time.sleep(wait_s)
    raise AssertionError("the last round returns or raises")


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind `error`; None where there was no answer."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return int(cause.response.status_code)
    return None


def _passes(error: BaseException, status: int | None) -> bool:
    """Whether trying again may help."""
    if status is not None:
        return status >= 500 or status in _PASSING
    # A ValueError without a status is the hub's verdict on the card, unless it is a page that is no JSON.
    is_verdict = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    return not is_verdict and not isinstance(error, PermissionError)


def _reason(error: BaseException, status: int | None) -> str:
    remedies = {
        401: "the hub refused the token: run `hf auth login`, or set HF_TOKEN to one that may write",
        403: "the token may not write there: check --repo_id, and what the token is allowed to",
    }
    return f"{remedies[status]} ({_short(error, status)})" if status in remedies else _short(error, status)


def _short(error: BaseException, status: int | None) -> str:
    """The first line of what went wrong, without the token and without the signature of an upload address."""
    from huggingface_hub import get_token

    lines = [line for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\?[^\s']+", "", lines[0] if lines else type(error).__name__)[:300]
    token = get_token()
    text = text.replace(token, "<token>") if token else text
    return text if status is None or str(status) in text else f"{status}: {text}"
