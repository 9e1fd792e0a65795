"""The address of an OpenAI-compatible endpoint as people write it, the key, and whose certificates are trusted."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from eval.judge.config import JudgeConfig
from otpo.errors import UserError

_AZURE = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_ENDPOINTS = ("/chat/completions", "/completions", "/responses", "/models")


@dataclass(frozen=True)
class Address:
    """Where requests go.

    Attributes:
        base: the part before /chat/completions.
        query: parameters of every request, such as Azure's api-version.
        azure: whether the key goes into the header `api-key`.
        loopback: whether it is this machine, for which no proxy is used.
    """

    base: str
    query: dict[str, str]
    azure: bool
    loopback: bool


def address_of(url: str) -> Address:
    """An address, also with /chat/completions at its end, without /v1 after the host, or with a query.

    Raises:
        UserError: it is none.
    """
    given = urlsplit(url.strip())
    try:
        known = given.scheme in ("http", "https") and bool(given.hostname) and given.port != 0
    except ValueError:
        known = False
    if not known or given.username:
        hint = f" Write http://{url} or https://{url}." if "://" not in url else ""
        raise UserError(
            f"judge.url: expected an address such as http://127.0.0.1:8000/v1, found '{_shown(url)}'.{hint}"
        )
    path = given.path.rstrip("/")
    for endpoint in _ENDPOINTS:
        path = path.removesuffix(endpoint)
    query = dict(parse_qsl(given.query))
    azure = str(given.hostname).endswith(_AZURE) or "api-version" in query
    path = path.rstrip("/") or ("/openai/v1" if azure and "api-version" not in query else "/v1")
    return Address(urlunsplit((given.scheme, given.netloc, path, "", "")), query, azure, given.hostname in _LOOPBACK)


def _shown(url: str) -> str:
    """An address without a name and password in it."""
    head, at, tail = url.rpartition("@")
    return f"***@{tail}" if at else head + tail


def key_of(config: JudgeConfig) -> str | None:
    """The key in the environment variable that `api_key_env` names; None if it is not set.

    Raises:
        UserError: it cannot be sent in a header. The message says why without showing it.
    """
    key = os.environ.get(config.api_key_env) or None
    if key is None:
        return None
    faults = {
        "a line end": "\n" in key or "\r" in key,
        "a space": key != key.strip() or " " in key.strip(),
        "a quotation mark": any(mark in key for mark in "\"'\u201c\u201d\u2018\u2019"),
        "the word Bearer": key.lower().startswith("bearer"),
        "a character that is not ASCII": not key.isascii(),
        "a control character": any(ord(sign) < 32 and sign not in "\r\n" for sign in key),
    }
    if found := [fault for fault, there in faults.items() if there]:
        raise UserError(
            f"The key in the environment variable {config.api_key_env} holds {' and '.join(found)}, which no key has: "
            "set it again without (the key itself is not shown here)."
        )
    return key


def certificates(config: JudgeConfig) -> ssl.SSLContext | None:
    """Whose certificates are trusted: those of `judge.ca_file`, else of SSL_CERT_FILE; None is the usual ones.

    Raises:
        UserError: the file cannot be read.
    """
    for name, file in (("judge.ca_file", config.ca_file), ("SSL_CERT_FILE", os.environ.get("SSL_CERT_FILE"))):
        if not file:
            continue
        try:
            return ssl.create_default_context(cafile=str(Path(file).expanduser()))
        except (OSError, ssl.SSLError) as error:
            raise UserError(f"{name}: expected a file of certificates (PEM) at {file}, found none: {error}.") from None
    return None
