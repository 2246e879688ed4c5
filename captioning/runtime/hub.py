"""Copies folders to and from a model hub with huggingface_hub, and explains its errors in one line.

HF_ENDPOINT names another hub or a mirror, HF_TOKEN the token; `hf auth login` stores one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from captioning.errors import UserError
from captioning.runtime.library_errors import reason


def upload(folder: Path, name: str, files: Collection[str], private: bool) -> str:
    """Upload these files of a folder as the model NAME, USER/MODEL, in one commit -> its URL.

    private: of a model that does not exist yet. Raises UserError.
    """
    hub = _import_hub()
    client = _client(hub, name)
    if not hub.get_token():
        raise UserError(f"{_host(hub)}: there is no token to write with; run: hf auth login, or set HF_TOKEN")
    with _hub_errors(hub, name):
        url = client.create_repo(name, private=private, exist_ok=True)
        client.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=sorted(files), commit_message="A packed run of Kantu"
        )
    return str(url)


def download(name: str, folder: Path, required: Collection[str], optional: Collection[str]) -> None:
    """Download files of the newest commit of the model NAME, USER/MODEL, to a folder. A stopped download continues.

    required, optional: names of files. Raises UserError, also if the model lacks a required one.
    """
    hub = _import_hub()
    client = _client(hub, name)
    with _hub_errors(hub, name):
        model = client.model_info(name)
        there = {file.rfilename for file in model.siblings or ()}
    if missing := sorted(set(required) - there):
        raise UserError(f"{name}: not a packed run of Kantu: lacks {', '.join(missing)}; check the name")
    with _hub_errors(hub, name):
        for file in (*required, *sorted(there & set(optional))):
            client.hf_hub_download(name, file, revision=model.sha, local_dir=folder)


def _import_hub() -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors  # noqa: F401  # attributes of the package from now on
    except ImportError:
        raise UserError("huggingface_hub is not installed; run: pip install -c constraints.txt -e '.[hub]'") from None
    return huggingface_hub


def _client(hub: Any, name: str) -> Any:
    """A client of the hub. Raises UserError if the name of a model is not USER/MODEL."""
    if name.count("/") != 1:
        raise _not_a_name(name)
    return hub.HfApi(endpoint=_endpoint(hub), library_name="kantu")


def _endpoint(hub: Any) -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or hub.constants.ENDPOINT


def _host(hub: Any) -> str:
    return urlsplit(_endpoint(hub)).netloc or _endpoint(hub)


def _not_a_name(name: str) -> UserError:
    return UserError(f"{name}: not a name of a model on a hub; give USER/MODEL, such as anna/flickr8k-zh")


@contextlib.contextmanager
def _hub_errors(hub: Any, name: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into a UserError. name: the model."""
    host, errors = _host(hub), hub.errors
    try:
        yield
    except errors.HFValidationError:
        raise _not_a_name(name) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: {host} has no such model, or only for a token that may read it; check the name, or run: "
            "hf auth login"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(f"{name}: {host} refuses the token ({status}); give one that may write there") from None
        raise UserError(f"{name}: {host} answered with status {status} ({reason(error)}); try again later") from None
    except Exception as error:  # its HTTP library's, or one of several classes for a machine without a network
        cause = reason(error.__cause__ or error)
        raise UserError(f"{name}: {host} cannot be reached, or failed ({cause}); connect, or set HF_ENDPOINT") from None
