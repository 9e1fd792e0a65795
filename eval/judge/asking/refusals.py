"""What an endpoint says when it does not give a chat completion, and what that means for the run."""

from __future__ import annotations

import json
import re
from typing import Any

_MODEL_UNKNOWN = re.compile(
    r"\bmodel\b.*(not (?:been )?(?:found|exist|available|loaded|supported)|does ?n[o']t exist|unknown|invalid|no such)"
    r"|(unknown|invalid|no such|unsupported|not found).{0,20}\bmodel\b",
    re.IGNORECASE | re.DOTALL,
)
_TOO_LONG = re.compile(
    r"context.{0,3}(length|window)|maximum context|too many tokens|prompt is too long|max_model_len", re.IGNORECASE
)
_FILTERED = re.compile(
    r"moderation|flagged|content.{0,3}(?:policy|filter|management)|responsible.?ai|safety (?:system|filter)",
    re.IGNORECASE,
)
_REGION = re.compile(r"unsupported_country|\b(?:country|region|territory|location)\b", re.IGNORECASE)
_SETTING = re.compile(r"logprobs|temperature|max_(?:completion_)?tokens|response_format|\bparameter\b", re.IGNORECASE)
_NO_CREDIT = re.compile(r"insufficient_quota|insufficient.{0,10}(?:credit|balance|funds)|billing", re.IGNORECASE)


def classify_status(status: int, text: str) -> tuple[str, str]:
    """(kind, detail) of the failure behind a reply whose status is not 200."""
    code, message = error_body(text)
    detail = f"HTTP {status} {message or text[:200].strip()}".strip()
    said = f"{code} {message}"
    if status == 401:
        return "auth", detail
    if status == 402:
        return "quota", detail
    if status == 403:
        kinds = ((_FILTERED, "refused"), (_REGION, "region"), (_NO_CREDIT, "quota"), (_SETTING, "bad_request"))
        return next((kind for pattern, kind in kinds if pattern.search(said)), "auth"), detail
    if status == 429:
        return ("quota" if "insufficient_quota" in said else "rate_limited"), detail
    if status == 404 and (code is None or "model" in code or re.search(r"\bmodel\b", message, re.IGNORECASE)):
        return "model_not_found", detail
    if status == 404:
        return "not_found", detail
    if status in (408, 504):
        return "timeout", detail
    if status >= 500 or status in (409, 425):
        return "server_error", detail
    if status == 413 or _TOO_LONG.search(said):
        return "context_length", detail
    if _FILTERED.search(said) and not _SETTING.search(said):
        return "refused", detail
    if status == 400 and ("model_not" in said.lower() or _MODEL_UNKNOWN.search(message)):
        return "model_not_found", detail
    return "bad_request", detail


def refusal_inside(text: str) -> tuple[str, str] | None:
    """(kind, detail) of what came with status 200 and is no completion, as gateways send errors; None if it is one."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        if re.match(r"\s*<(?:!doctype|html)", text, re.IGNORECASE):
            return "malformed", f"a web page in place of a chat completion: {text[:100].strip()}"
        return "malformed", f"no JSON: {text[:100].strip()}"
    if isinstance(body, dict) and body.get("choices"):
        return None
    body = _unlisted(body)
    if not isinstance(body, dict) or not (body.get("error") or body.get("message") or body.get("detail")):
        return "malformed", f"not a chat completion: {text[:100].strip()}"
    error: Any = body.get("error") or body
    status = error.get("code") if isinstance(error, dict) else None
    if isinstance(status, int) and 400 <= status < 500:
        return classify_status(status, text)
    _, message = error_body(text)
    return "malformed", f"an error inside a 200: {message or text[:200]}"


def error_body(text: str) -> tuple[str | None, str]:
    """(code, message) of an error body in any of the usual shapes; code is None if the body is not JSON."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None, ""
    body = _unlisted(body)
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return "", str(error)
    message = error.get("message") or error.get("detail") or ""
    inner = error.get("metadata")
    if isinstance(inner, dict) and inner.get("raw"):  # what OpenRouter passes on of the provider's own words
        message = f"{message}: {inner['raw']}"
    code = str(error.get("code") or error.get("type") or "")
    return code, message if isinstance(message, str) else json.dumps(message)


def _unlisted(body: Any) -> Any:
    """An error's body, which Google's servers put into a list."""
    return body[0] if isinstance(body, list) and body else body
