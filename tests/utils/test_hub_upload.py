"""Pushing a folder, against a small hub on this machine: who, which repository, commit; refusals, faults, patience."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session

from tests.loopback_hub import REPO, TOKEN, Hub, running_hub
from utils import hub_upload
from utils.common import UserError
from utils.hub import _why_unreachable
from utils.hub_upload import push_folder, require_account


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that knows `TOKEN`; this process is logged in to it."""
    _why_unreachable.cache_clear()
    close_session()
    with running_hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(hub_upload, "WAITS_S", (0.0, 0.0))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(variable, raising=False)
        yield server
    close_session()
    _why_unreachable.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export in small."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- who --------------------------------------------------------------------------------------------------------------
def test_the_account_gives_the_owner(hub: Hub) -> None:
    assert require_account("vtg") == REPO
    assert require_account("lab/vtg") == "lab/vtg"
    assert set(hub.asked) == {"HEAD /", "GET /api/whoami-v2"}


def test_a_refused_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_AnotherOne")
    hub.echo_token = True
    with pytest.raises(UserError, match="the hub refused the token: run `hf auth login`, or set HF_TOKEN") as caught:
        require_account(REPO)
    assert "hf_AnotherOne" not in str(caught.value) and "\n" not in str(caught.value)
    assert hub.asked.count("GET /api/whoami-v2") == 1  # trying again would not help


def test_a_token_that_only_reads(hub: Hub) -> None:
    hub.role = "read"
    with pytest.raises(UserError, match="the token of me may only read"):
        require_account(REPO)


def test_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="needs a token that may write: run `hf auth login`, or set HF_TOKEN"):
        require_account(REPO)
    assert hub.asked == []


def test_offline_and_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it"):
        require_account(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="http://127.0.0.1:9 cannot be reached"):
        require_account(REPO)


@pytest.mark.parametrize("name", ["a/b/c", "me/", "me/a b", "-x"])
def test_a_bad_name(hub: Hub, name: str) -> None:
    with pytest.raises(UserError, match=r"--repo_id .* is no name for a repository"):
        require_account(name)
    assert hub.asked == []


# --- repository and commit --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("private", "made"), [(True, True), (False, False), (None, False)])
def test_a_new_repository(hub: Hub, folder: Path, private: bool | None, made: bool) -> None:
    assert push_folder(folder, REPO, private=private, message="Export") == f"{hub.url}/{REPO}"
    assert hub.files == contents(folder) and hub.commits == ["Export"] and hub.private is made
    assert [(repo["organization"], repo["name"]) for repo in hub.created] == [("me", "vtg")]
    assert list(hub.blobs) == [hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()]
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_an_existing_repository(hub: Hub, folder: Path) -> None:
    """Its files of the same names are replaced, others stay, and it is not made again."""
    hub.private, hub.files = True, {"README.md": b"old", "picture.png": b"png", "model.safetensors": b"old"}
    push_folder(folder, REPO, private=True, message="Export")
    assert hub.created == [] and hub.files == {**contents(folder), "picture.png": b"png"}


def test_private_weights_do_not_go_into_a_public_repository(hub: Hub, folder: Path) -> None:
    hub.private = False
    with pytest.raises(UserError, match="--private, but me/vtg exists and is public"):
        push_folder(folder, REPO, private=True, message="Export")
    assert hub.asked == [f"GET /api/models/{REPO}"]


def test_weights_that_would_be_mixed_up(hub: Hub, folder: Path) -> None:
    """An adapter beside full weights: transformers would put it on them."""
    hub.private, hub.files = False, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    with pytest.raises(UserError, match=r"does not replace \(adapter_config.json, adapter_model.safetensors\)"):
        push_folder(folder, REPO, private=None, message="Export")
    assert hub.commits == []


# --- faults -----------------------------------------------------------------------------------------------------------
COMMIT, CREATE, INFO = f"/api/models/{REPO}/commit/main", "/api/repos/create", f"/api/models/{REPO}"


@pytest.mark.parametrize("path", [INFO, CREATE, COMMIT, "/api/validate-yaml", f"/{REPO}.git/info/lfs/objects/batch"])
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_stumbles_is_asked_again(
    hub: Hub, folder: Path, path: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _s: None)  # its own patience
    hub.fail[path] = [status]
    push_folder(folder, REPO, private=None, message="Export")
    assert hub.files == contents(folder) and hub.commits == ["Export"]
    assert len([asked for asked in hub.asked if asked.endswith(path)]) >= 2


def test_what_was_sent_is_not_sent_again(hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The commit fails once; the weights are there already."""
    hub.fail[COMMIT] = [502]
    with caplog.at_level(logging.WARNING):
        push_folder(folder, REPO, private=None, message="Export")
    assert len([asked for asked in hub.asked if asked.startswith("PUT /blob/")]) == 1
    assert hub.asked.count(f"POST {COMMIT}") == 2
    assert "uploading to me/vtg: " in caplog.text and "502" in caplog.text


def test_a_server_that_stays_down(hub: Hub, folder: Path) -> None:
    hub.fail[COMMIT] = [503] * 9
    with pytest.raises(UserError, match=r"uploading to me/vtg: .*503.*the same command again goes on") as caught:
        push_folder(folder, REPO, private=None, message="Export")
    assert hub.asked.count(f"POST {COMMIT}") == 3 and "\n" not in str(caught.value)
    hub.fail.clear()
    push_folder(folder, REPO, private=None, message="Export")  # the same call again
    assert hub.files == contents(folder)
    assert len([asked for asked in hub.asked if asked.startswith("PUT /blob/")]) == 1


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        (CREATE, 403, "making me/vtg: the token may not write there: check --repo_id"),
        (COMMIT, 403, "uploading to me/vtg: the token may not write there"),
        (COMMIT, 401, "uploading to me/vtg: the hub refused the token"),
        (COMMIT, 413, "uploading to me/vtg: .*413"),
    ],
)
def test_a_refusal_is_final(hub: Hub, folder: Path, path: str, status: int, message: str) -> None:
    hub.fail[path] = [status]
    with pytest.raises(UserError, match=message):
        push_folder(folder, REPO, private=None, message="Export")
    assert hub.asked.count(f"POST {path}") == 1 and hub.commits == []


@pytest.mark.parametrize(
    ("fault", "calls"),
    [
        (ConnectionResetError("connection reset"), 3),
        (RuntimeError("Data processing error: CAS service error"), 3),
        (PermissionError("Xet: not authorised"), 1),
        (ValueError("Invalid metadata in README.md.\n- license must be one of"), 1),
    ],
)
def test_faults_without_a_status(
    fault: Exception, calls: int, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Xet raises them, which the real hub's uploads go through: a broken line is tried again, a refusal is not."""
    made = []

    def upload(_self: HfApi, **options: str) -> None:
        made.append(options["repo_id"])
        raise fault

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    with pytest.raises(UserError, match=f"uploading to me/vtg: {str(fault).splitlines()[0]}") as caught:
        push_folder(folder, REPO, private=None, message="Export")
    assert made == [REPO] * calls and "\n" not in str(caught.value)


def test_no_message_shows_the_token(
    hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even when the server repeats it."""
    hub.echo_token = True
    said = []
    for path, status in ((INFO, 500), (CREATE, 403), (COMMIT, 401), (COMMIT, 500)):
        hub.fail = {path: [status] * 9}
        with caplog.at_level(logging.INFO), pytest.raises(UserError) as caught:
            push_folder(folder, REPO, private=None, message="Export")
        said.append(str(caught.value))
    printed = capfd.readouterr()
    assert len(said) == 4
    assert TOKEN not in "".join([*said, caplog.text, printed.out, printed.err])
    assert not any(TOKEN.encode() in data for data in contents(folder).values())


def test_an_upload_that_breaks_hides_the_signature(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that weights go to is signed: whoever reads it may write there."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _s: None)
    blob = "/blob/" + hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub.fail[blob] = [403]
    with pytest.raises(UserError) as caught:
        push_folder(folder, REPO, private=None, message="Export")
    assert "X-Signature" not in str(caught.value)
