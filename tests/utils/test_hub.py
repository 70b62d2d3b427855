"""Asking whether the hub can be reached: at once where it cannot, and not at all where it is not needed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from utils.common import UserError
from utils.hub import TIMEOUT_VARIABLE, _why_unreachable, require_hub

NAME = "Qwen/Qwen3-VL-4B-Instruct"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Online, with an empty cache and a closed port for a hub."""
    _why_unreachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    yield monkeypatch
    _why_unreachable.cache_clear()


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def hub_at(port: int) -> Iterator[list[str]]:
    """A hub that knows nothing: gives the paths it was asked for."""
    asked: list[str] = []

    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", port), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield asked
        finally:
            server.shutdown()


def test_a_closed_port_is_one_error_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        require_hub(NAME)
    assert time.monotonic() - started < 3
    message = str(caught.value)
    assert message.startswith(f"cannot load '{NAME}': {constants.ENDPOINT} cannot be reached (")
    assert "Connection refused" in message and "HF_ENDPOINT" in message and "\n" not in message


def test_a_hub_that_is_silent_is_waited_for_as_long_as_the_setting_says(hub: pytest.MonkeyPatch) -> None:
    hub.setenv(TIMEOUT_VARIABLE, "0.3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(UserError, match=r"no answer within 0\.3 s; HF_HUB_ETAG_TIMEOUT sets how long to wait"):
            require_hub(NAME)
    assert 0.25 < time.monotonic() - started < 2


@pytest.mark.parametrize("endpoint", ["no-scheme", "http://127.0.0.1:port"])
def test_an_endpoint_that_is_none(hub: pytest.MonkeyPatch, endpoint: str) -> None:
    hub.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(UserError, match=rf"{endpoint} cannot be reached \(\w.*\)\. Check the network"):
        require_hub(NAME)


def test_any_answer_will_do_and_is_asked_for_once_but_a_failure_is_asked_again() -> None:
    with pytest.raises(UserError):
        require_hub(NAME)
    with hub_at(int(constants.ENDPOINT.rpartition(":")[2])) as asked:
        for name in (NAME, NAME, "another/model"):
            require_hub(name)
    assert asked == ["/"]


def test_what_needs_no_hub_asks_none(hub: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The port is closed, so asking would raise."""
    require_hub(str(tmp_path))
    snapshot = tmp_path / "cache" / "models--Qwen--Qwen3-VL-4B-Instruct" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    with pytest.raises(UserError):  # begun, but not there yet
        require_hub(NAME)
    (snapshot / "config.json").write_text("{}")
    require_hub(NAME)
    hub.setattr(constants, "HF_HUB_OFFLINE", True)
    require_hub("another/model")
