"""What can go wrong with a repository, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from quantrecipe.schema.problems import QuantrecipeError

LOGIN: Final = "log in with 'hf auth login' (or set HF_TOKEN)"

# Message and hint by kind; kinds with "?" are for those who gave no token.
_TEXTS: Final = {
    "offline": (
        "is not on this machine, and offline mode is on",
        "Fetch it with 'quantrecipe pull' first, or unset HF_HUB_OFFLINE.",
    ),
    "gated": (
        "is only for those who have accepted its terms",
        "Accept them at {page}, with the account that your token is of.",
    ),
    "gated?": (
        "is only for those who have accepted its terms",
        "Accept them at {page}, then {login}.",
    ),
    "bad-token": (
        "the token that was sent is not valid",
        "Take it out of HF_TOKEN if it is there, and {login}.",
    ),
    "no-token?": ("asks for a token", "First {login}."),
    "no-token": ("does not take this token", "Please {login} again."),
    "no-repository": (
        "there is no such repository",
        "Check its name. If it is private, the account that your token is of needs access.",
    ),
    "no-repository?": (
        "there is no such repository",
        "Check its name. If it is private, {login}.",
    ),
    "no-revision": (
        "there is no such revision",
        "Its branches, tags and commits are at {page}/commits.",
    ),
    "missing-file": ("there is no such file any more", "See {page}/tree/main."),
    "forbidden": (
        "is not allowed: {said}",
        "Give your token the permission that is missing, at {endpoint}/settings/tokens.",
    ),
    "rate-limit": (
        "the Hub says that there were too many requests",
        "Run the same command again in some minutes.",
    ),
    "rate-limit?": (
        "the Hub says that there were too many requests",
        "Run the same command again in some minutes. Who has a token may send more: {login}.",
    ),
    "hub-failing": (
        "the Hub answers {status}: {said}",
        "Run the same command again later.",
    ),
    "no-connection": (
        "cannot be reached: {said}",
        "Check the network, and HF_ENDPOINT ({endpoint}); then run the same command again.",
    ),
}


class HubError(QuantrecipeError):
    """A repository could not be read, or not be written to.

    Attributes:
        kind: for programs: a key of the texts above, without "?".
        place: the repository or file, as an address.
        message: what is wrong.
        hint: what to do about it.
    """

    def __init__(self, kind: str, place: str, message: str, hint: str) -> None:
        self.kind = kind
        self.place = place
        self.message = message
        self.hint = hint
        super().__init__(f"{place}: {message}\n  {hint}")


@contextmanager
def explaining(place: str, repo: str) -> Iterator[None]:
    """Within it, what the Hub's client raises becomes a ``HubError``.

    Args:
        place: what is asked for, as an address.
        repo: the repository, ``owner/name``.

    Raises:
        HubError: in place of errors of the client.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionResolutionError

    more = LocalEntryNotFoundError, RevisionResolutionError
    expected: tuple[type[Exception], ...] = (*transport_errors(), *more)
    try:
        yield
    except expected as error:
        raise explained(error, place, repo) from error


def transport_errors() -> tuple[type[Exception], ...]:
    """What the client raises where a request was not answered, or not as it should be."""
    from huggingface_hub.errors import HfHubHTTPError

    # The base of all errors of the HTTP library that it is built upon, whichever that is.
    base = next(one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError")
    assert issubclass(base, Exception)
    return base, ConnectionError


def explained(error: Exception, place: str, repo: str) -> HubError:
    """What an error of the Hub's client means. See ``explaining``."""
    from huggingface_hub import get_token

    kind = _kind(error)
    unknown = f"{kind}?"
    message, hint = _TEXTS[unknown if unknown in _TEXTS and get_token() is None else kind]
    given = {
        "page": f"{endpoint()}/{repo}",
        "endpoint": endpoint(),
        "login": LOGIN,
        "status": _status(error),
        "said": _said(error) or _first_line(error),
    }
    return HubError(kind, place, message.format_map(given), hint.format_map(given))


def _kind(error: Exception) -> str:
    from huggingface_hub import errors

    cause = error.__cause__
    told = errors.LocalEntryNotFoundError, errors.RevisionResolutionError
    if isinstance(error, told) and isinstance(cause, Exception):
        # The client looks into its cache when the Hub does not answer, and tells of that.
        return _kind(cause)
    status = _status(error)
    if status == 401 and "Invalid credentials" in _said(error):
        return "bad-token"
    for known, kind in (
        (errors.OfflineModeIsEnabled, "offline"),
        (errors.LocalEntryNotFoundError, "offline"),
        (errors.GatedRepoError, "gated"),
        (errors.RepositoryNotFoundError, "no-repository"),
        (errors.RevisionNotFoundError, "no-revision"),
        (errors.EntryNotFoundError, "missing-file"),
    ):
        if isinstance(error, known):
            return kind
    if status is None:
        return "no-connection"
    return {401: "no-token", 403: "forbidden", 429: "rate-limit"}.get(status, "hub-failing")


def endpoint() -> str:
    """Where the Hub is: ``HF_ENDPOINT``."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _said(error: Exception) -> str:
    response = getattr(error, "response", None)
    return "" if response is None else str(response.headers.get("X-Error-Message") or "")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
