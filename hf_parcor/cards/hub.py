"""A card, or results alone, on the Hub: read what is there, update it, commit; again if somebody was faster."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from hf_parcor.cards.facts import ModelFacts
from hf_parcor.cards.folder import CARD, card_of, files_beside, is_ours, read_text
from hf_parcor.cards.front_matter import beside_earlier_results, eval_result_file, model_index, values_of
from hf_parcor.cards.text import read_card, with_metadata

_ATTEMPTS = 4
_LONGEST_WAIT = 60.0
_CONFLICT = (409, 412)
_BUSY = (429, 500, 502, 503, 504)
_WHY = {
    401: "the token is missing, wrong or has expired: run `hf auth login`",
    403: "the token may not write there: take one that may, or open a pull request (create_pr=True)",
    404: "there is no such repository, or the token may not see it: check the name",
    409: "others change the repository at the same time: try again",
    412: "others change the repository at the same time: try again",
    429: "the Hub takes no more requests for now: try again in some minutes",
}
# What a connection that fails raises, too; the client has changed its HTTP library, and the name stayed.
HTTP_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


class HubError(OSError):
    """The Hub cannot be reached, or refuses. Nothing local was changed; the same call can be repeated."""


@dataclass(frozen=True)
class Destination:
    """Where and how to push to the Hub.

    Attributes:
        repo_id: The model. It is created if needed, but not for a pull request.
        revision: The branch; None for main.
        create_pr: Whether to open a pull request instead, for the models of others.
        dry_run: Whether to send nothing and only return the difference.
        api: The client, with its token. By default, one with the token of `hf auth login` or `HF_TOKEN`.
    """

    repo_id: str
    revision: str | None = None
    create_pr: bool = False
    dry_run: bool = False
    api: HfApi | None = None


class Published(NamedTuple):
    """The result of a push.

    Attributes:
        url: The URL of the commit or the pull request; "" for a dry run, or if the Hub already has everything.
        difference: The change of the card, as a unified diff; "" if it is unchanged.
    """

    url: str
    difference: str


class Change(NamedTuple):
    """What to change.

    Attributes:
        update: Returns the card from the card that is there; "" for none.
        files: Returns what lies beside it; pictures are drawn when the Hub has answered.
        message: Of the commit.
        check: Asks the Hub whether this may be said there, and raises a `ValueError` if not.
    """

    update: Callable[[str], str]
    files: Callable[[], Mapping[str, bytes]]
    message: str
    check: Callable[[HfApi], None] = lambda api: None


def check_online(repo_id: str) -> None:
    """Refuse offline mode, before anything is read or drawn for the Hub.

    Raises:
        HubError: Nothing may be asked of the Hub.
    """
    if constants.HF_HUB_OFFLINE:
        raise _refusal(repo_id, "offline mode; unset HF_HUB_OFFLINE")


def _refusal(repo_id: str, found: str) -> HubError:
    return HubError(f"{repo_id}: expected the Hub to take the change, got {found}; nothing local was changed")


def publish(change: Change, to: Destination) -> Published:
    """Make a change, unless somebody else changed the repository in between: then read it again, a few times.

    Raises:
        HubError: The Hub cannot be reached or refuses.
        ValueError: The card that is there cannot be updated.
    """
    check_online(to.repo_id)
    api = to.api or HfApi()
    attempt = 0
    while True:
        outcome = _attempt(api, change, to)
        if isinstance(outcome, Published):
            return outcome
        wait = _wait(outcome.__cause__, attempt, to.create_pr)
        attempt += 1
        if wait is None or attempt == _ATTEMPTS:
            raise outcome
        time.sleep(wait)


def _attempt(api: HfApi, change: Change, to: Destination) -> Published | HubError:
    """Return what became of it, or the error to raise if there is to be no other attempt."""
    cause: BaseException
    try:
        return _once(api, change, to)
    except LocalTokenNotFoundError as error:
        cause, found = error, "no token; run `hf auth login`, or set HF_TOKEN"
    except HfHubHTTPError as error:
        cause, found = error, _refused(error)
    except (OSError, HTTP_ERROR) as error:
        cause, found = error, f"{type(error).__name__} from {api.endpoint}; check the connection and try again"
    except json.JSONDecodeError as error:
        cause, found = error, f"no JSON from {api.endpoint}; check that this is the Hub and try again"
    except RuntimeError as error:  # the client's, of an upload that broke off
        if error.__cause__ is None:
            raise
        cause, found = error, f"{type(error.__cause__).__name__} in the middle of an upload; try again"
    outcome = _refusal(to.repo_id, found)
    outcome.__cause__ = cause
    return outcome


def card_on_hub(api: HfApi, repo_id: str, revision: str | None = None) -> tuple[str, Any]:
    """Return the card of a model on the Hub, "" where there is none, and what the Hub says of the model.

    It is read at the commit that the Hub names now: a copy in the cache may be older.

    Raises:
        HfHubHTTPError: The Hub refused, or has no such model.
        Exception: It cannot be reached; the class is that of the HTTP library.
    """
    info = api.model_info(repo_id, revision=revision)
    if CARD not in paths_in(info):
        return "", info
    return read_text(Path(api.hf_hub_download(repo_id, CARD, revision=info.sha))), info


def _once(api: HfApi, change: Change, to: Destination) -> Published:
    change.check(api)
    try:
        text, info = card_on_hub(api, to.repo_id, to.revision)
    except RepositoryNotFoundError as error:
        if to.create_pr or error.response.status_code != 404:
            raise
        if to.dry_run:
            return Published("", difference("", change.update("")))
        api.create_repo(to.repo_id, exist_ok=True)
        text, info = card_on_hub(api, to.repo_id, to.revision)
    card = change.update(text)
    changed = difference(text, card)
    if to.dry_run:
        return Published("", changed)
    beside = change.files()
    files = {**beside, **({CARD: card.encode()} if card != text else {})}
    old = [path for path in paths_in(info) if beside and is_ours(path) and path not in files]
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(path, content) for path, content in files.items()),
        *(CommitOperationDelete(path) for path in old),
    ]
    commit = api.create_commit(
        to.repo_id,
        operations,
        commit_message=change.message,
        revision=to.revision,
        create_pr=to.create_pr,
        parent_commit=info.sha,
    )
    if commit.oid == info.sha:  # all of it was there
        return Published("", changed)
    return Published(commit.pr_url or commit.commit_url, changed)


def paths_in(info: Any) -> list[str]:
    """Return the files of a model, of what the Hub says of it."""
    return [entry.rfilename for entry in info.siblings or []]


def difference(before: str, after: str) -> str:
    """Return a unified diff of two cards; "" where they are the same."""
    old, new = (text.splitlines(keepends=True) for text in (before, after))
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in difflib.unified_diff(old, new, CARD, CARD))


def _wait(error: BaseException | None, attempt: int, create_pr: bool) -> float | None:
    """Return how many seconds to wait before the next attempt; None if there is to be none."""
    if not isinstance(error, HfHubHTTPError):
        return None
    status = error.response.status_code
    if status in _CONFLICT:
        return 0.0
    # A pull request that was opened although its answer is an error would be opened twice.
    if status not in _BUSY or (create_pr and status != 429):
        return None
    asked = error.response.headers.get("Retry-After", "")
    return min(float(asked) if asked.isdigit() else 2.0**attempt, _LONGEST_WAIT)


def _refused(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = f" ({error.server_message})" if error.server_message else ""
    return f"status {status}{said}; {_WHY.get(status, 'try again later')}"


_LONGEST_MESSAGE = 150
_BENCHMARK = "eval.yaml"  # at the root of a data set that is a registered benchmark


def push_card(facts: ModelFacts, to: Destination) -> Published:
    """Create or update the card of a model on the Hub, with the facts, the results and the pictures beside it.

    What others wrote on the card is kept. If somebody changed the repository in between, the card is read and updated
    again. If the Hub asks to wait, the push is repeated a few times.

    Raises:
        HubError: The Hub cannot be reached or refuses. Nothing local was changed: call again.
        ValueError: The card on the Hub cannot be updated (see `updated_card`), or there is a result for a leaderboard
            that the data set on the Hub does not have.
    """
    files = cache(partial(files_beside, facts))
    message = _message(f"Robustness to parameter corruption of {facts.name}")
    change = Change(lambda text: card_of(facts, files(), text), files, message)
    if eval_result_file(facts):
        change = change._replace(check=partial(_check_benchmark, facts))
    return publish(change, to)


def _check_benchmark(facts: ModelFacts, api: HfApi) -> None:
    """Refuse a result for a leaderboard that the Hub does not know.

    Raises:
        ValueError: The data set has no `eval.yaml`, or that no such task, or the task is of another part of the data.
    """
    data = facts.evaluated_on
    try:
        path = Path(api.hf_hub_download(data.id, _BENCHMARK, repo_type="dataset"))
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (EntryNotFoundError, RepositoryNotFoundError, yaml.YAMLError):
        described = None
    tasks = described.get("tasks") if isinstance(described, dict) else None
    known = {str(task.get("id")): task for task in tasks or [] if isinstance(task, dict)}
    task = known.get(facts.benchmark_task)
    if task is None:
        raise ValueError(
            f"benchmark_task: expected a task of {data.id}, as its {_BENCHMARK} on the Hub names them, got "
            f"{facts.benchmark_task!r}, and there {', '.join(known) or 'none'}; leave it out: the leaderboard is for "
            "registered benchmarks"
        )
    pairs = {"config": data.config or "default", "split": data.split}
    other = [name for name, value in pairs.items() if value and str(task.get(name) or value) != value]
    if other:
        raise ValueError(
            f"benchmark_task: expected a result on {other[0]} {task[other[0]]} of {data.id}, as "
            f"{facts.benchmark_task} asks for, got one on {pairs[other[0]]}; measure there, or leave the task out"
        )


def push_results(facts: ModelFacts, to: Destination) -> Published:
    """Add only results to the `model-index` of a card on the Hub, as `evaluate.push_to_hub` does with one.

    Of our earlier results only those of the same corruptions are replaced. The text and all other metadata are kept.

    Args:
        facts: The source of the results; leave out corruptions to push fewer.
        to: As in `push_card`.

    Raises:
        HubError: As in `push_card`.
        ValueError: As in `push_card`.
    """

    def update(text: str) -> str:
        earlier = values_of(read_card(text).front_matter).get("model-index")
        return with_metadata(text, {"model-index": beside_earlier_results(earlier, model_index(facts))})

    return publish(Change(update, dict, _message(f"Results under parameter corruption of {facts.name}")), to)


def _message(text: str) -> str:
    return " ".join(text.split())[:_LONGEST_MESSAGE]
