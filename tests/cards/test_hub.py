"""The real client of the Hub against a server on this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import yaml
from for_each import for_each
from hub_server import TOKEN, Failure, Repository
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from hf_parcor.cards import Destination, HubError, push_card, push_results, write_card
from hf_parcor.cards.hub import difference

# The client itself hands bytes to its HTTP library in a way that this one is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PERSON = "---\nlicense: mit # mine\n---\n# My model\n\nMy own words.\n"


@pytest.fixture
def repository(hub):
    hub.repositories["me/tiny"] = found = Repository()
    found.commit({**found.files, "README.md": PERSON.encode()})
    return found


def card_of(repository):
    return repository.files["README.md"].decode()


class TestPushCard:
    def test_makes_the_repository_and_all_files(self, hub, api, facts, tmp_path):
        published = push_card(facts, Destination("me/tiny", api=api))
        repository = hub.repositories["me/tiny"]
        assert published.url == f"{hub.endpoint}/me/tiny/commit/{repository.head}"
        written = write_card(tmp_path, facts).parent
        beside = {str(path.relative_to(written)): path for path in written.rglob("*") if path.is_file()}
        assert {name: path.read_bytes() for name, path in beside.items()} == {
            name: content for name, content in repository.files.items() if name != ".gitattributes"
        }
        assert "PUT /storage/" in "".join(hub.requests), "the picture goes through LFS"

    def test_is_read_back_by_the_client(self, hub, api, facts, tmp_path):
        push_card(facts, Destination("me/tiny", api=api))
        path = api.hf_hub_download("me/tiny", "robustness_facts.json", local_dir=tmp_path)
        assert type(facts).load(path).to_json() == facts.to_json()
        (result,) = [one for one in ModelCard.load("me/tiny").data.eval_results if one.metric_args["n"] == 2]
        assert result.metric_value == 0.625

    @pytest.mark.slow
    def test_twice_sends_nothing(self, hub, api, facts):
        push_card(facts, Destination("me/tiny", api=api))
        head = hub.repositories["me/tiny"].head
        assert push_card(facts, Destination("me/tiny", api=api)) == ("", "")
        assert hub.repositories["me/tiny"].head == head

    def test_keeps_what_a_person_wrote(self, repository, api, facts):
        push_card(facts, Destination("me/tiny", api=api))
        assert card_of(repository).startswith("---\nlicense: mit # mine\nlibrary_name: transformers\n")
        assert "\n---\n# My model\n\nMy own words.\n\n<!-- hf_parcor:begin" in card_of(repository)

    @pytest.mark.slow
    def test_removes_results_that_are_not_measured_any_more(self, hub, api, facts_with, record_of):
        push_card(facts_with(record_of(label="old")), Destination("me/tiny", api=api))
        repository = hub.repositories["me/tiny"]
        old = ".eval_results/hf_parcor-org_reviews_old.yaml"  # as earlier versions wrote one for each corruption
        repository.commit({**repository.files, old: b"[]"})
        push_card(facts_with(), Destination("me/tiny", api=api))
        assert old not in hub.repositories["me/tiny"].files
        assert "accuracy, old" not in card_of(hub.repositories["me/tiny"])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("described", "says"),
        [
            ("tasks: [{id: stars, config: default, split: test}]", ""),
            ("tasks: [{id: stars}]", ""),
            (None, "expected a task of org/reviews, .* got 'stars', and there none; leave it out"),
            ("tasks: [{id: other}]", "got 'stars', and there other"),
            ("tasks: [", "and there none"),
            ("- stars", "and there none"),
            ("tasks: [{id: stars, split: train}]", "expected a result on split train .* got one on test"),
            ("tasks: [{id: stars, config: fr}]", "expected a result on config fr .* got one on default"),
        ],
    )
    def test_a_leaderboard_is_one_that_the_hub_knows(self, hub, api, facts_with, described, says):
        hub.repositories["me/tiny"] = repository = Repository()
        hub.repositories["datasets/org/reviews"] = benchmark = Repository()
        if described is not None:
            benchmark.commit({"eval.yaml": described.encode()})
        if says:
            with pytest.raises(ValueError, match=says):
                push_card(facts_with(benchmark_task="stars"), Destination("me/tiny", api=api))
            assert not repository.messages, "nothing was pushed"
        else:
            push_card(facts_with(benchmark_task="stars"), Destination("me/tiny", api=api))
            assert [name for name in repository.files if name.startswith(".eval")] == [
                ".eval_results/hf_parcor-org_reviews.yaml"
            ]
        push_card(facts_with(), Destination("me/tiny", api=api))
        assert not [name for name in repository.files if name.startswith(".eval")]

    def test_a_pull_request_leaves_the_branch_alone(self, hub, repository, api, facts):
        head = repository.head
        published = push_card(facts, Destination("me/tiny", create_pr=True, api=api))
        assert published.url == f"{hub.endpoint}/me/tiny/discussions/1"
        assert repository.head == head
        assert "hf_parcor:begin" in repository.pull_requests[0][1]["README.md"].decode()

    def test_a_dry_run_only_reads(self, hub, repository, api, facts):
        published = push_card(facts, Destination("me/tiny", dry_run=True, api=api))
        assert published.url == ""
        assert "+## Robustness to parameter corruption\n" in published.difference
        assert "-license" not in published.difference
        assert not any(request.startswith(("POST", "PUT")) for request in hub.requests)

    def test_a_dry_run_for_a_model_that_is_not_there(self, hub, api, facts):
        assert "+# tiny-bert\n" in push_card(facts, Destination("me/new", dry_run=True, api=api)).difference
        assert "me/new" not in hub.repositories

    def test_no_model_is_made_for_a_pull_request(self, hub, api, facts):
        with pytest.raises(HubError, match=r"status 404.*check the name"):
            push_card(facts, Destination("me/new", create_pr=True, api=api))
        assert "me/new" not in hub.repositories

    def test_a_long_name_makes_no_long_message(self, repository, api, facts):
        push_card(replace(facts, name="n" * 200), Destination("me/tiny", api=api))
        assert len(repository.messages[-1]) == 150

    def test_lines_of_a_difference_end(self):
        assert difference("same\none", "same\ntwo").splitlines()[-3:] == [" same", "-one", "+two"]


class TestPushResults:
    def test_only_the_model_index_changes(self, repository, api, facts):
        repository.commit({**repository.files, "robustness_facts.json": b"{}"})
        push_results(facts, Destination("me/tiny", api=api))
        assert card_of(repository).endswith("\n---\n# My model\n\nMy own words.\n")
        assert list(yaml.safe_load(card_of(repository).split("---")[1])) == ["license", "model-index"]
        assert set(repository.files) == {".gitattributes", "README.md", "robustness_facts.json"}

    @pytest.mark.slow
    def test_results_of_other_corruptions_stay(self, repository, api, facts_with, record_of):
        push_results(facts_with(record_of(label="first")), Destination("me/tiny", api=api))
        push_results(facts_with(record_of(values=(0.5, 0.5), label="second")), Destination("me/tiny", api=api))
        push_results(facts_with(record_of(values=(0.125, 0.125), label="second")), Destination("me/tiny", api=api))
        index = yaml.safe_load(card_of(repository).split("---")[1])["model-index"]
        found = {metric["name"]: metric["value"] for result in index[0]["results"] for metric in result["metrics"]}
        assert found == {
            "accuracy, first": 0.625,
            "accuracy, no corruption": 0.9,
            "accuracy, second": 0.125,
            "accuracy, gradient-based L∞ ε=0.1": 0.25,
        }


COMMIT = "POST .*/commit/"
TRANSIENT = {
    "rate limit when reading": Failure("GET /api/models", 429, {"Retry-After": "3"}),
    "rate limit when committing": Failure(COMMIT, 429, {"Retry-After": "3"}),
    "rate limit at the storage": Failure("PUT /storage", 429, times=2),
    "error of the server when committing": Failure(COMMIT, 503),
    "error of the server at the storage": Failure("PUT /storage", 500),
    "conflict": Failure(COMMIT, 409),
    "connection cut at the storage": Failure("PUT /storage"),
}
PERMANENT = {
    "expired token": (
        Failure("GET /api/models", 401, message="Invalid credentials"),
        r"status 401 \(Invalid credentials\); .*hf auth login",
    ),
    "expired on the way": (Failure(COMMIT, 401, message="Invalid credentials"), "status 401.*hf auth login"),
    "no right to write": (Failure(COMMIT, 403, message="Forbidden"), "status 403.*create_pr"),
    "rate limit for long": (Failure(COMMIT, 429, times=9), "status 429.*some minutes"),
    "conflict for long": (Failure(COMMIT, 412, times=9), "status 412.*others"),
    "gone in the middle of an upload": (Failure("PUT /storage", times=99), "in the middle of an upload"),
    "gone at the commit": (Failure(COMMIT, times=9), "check the connection"),
    "gone from the start": (Failure("GET", times=99), "check the connection"),
}


class TestFailures:
    @pytest.fixture(autouse=True)
    def _does_not_wait(self, hub, monkeypatch):
        monkeypatch.setattr("hf_parcor.cards.hub.time.sleep", hub.waited.append)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", TRANSIENT)
    def test_what_passes_is_waited_for(self, hub, repository, api, facts, name):
        failure = TRANSIENT[name]
        hub.failures.append(Failure(**vars(failure)))
        assert push_card(facts, Destination("me/tiny", api=api)).url
        assert not hub.failures
        assert "My own words." in card_of(repository)
        assert "hf_parcor:begin" in card_of(repository)
        if "Retry-After" in failure.headers:
            assert any(3 <= seconds <= 4 for seconds in hub.waited)

    @pytest.mark.slow
    @for_each(
        ("headers", "waited"),
        [({}, [1.0, 2.0, 4.0]), ({"Retry-After": "5"}, [5.0] * 3), ({"Retry-After": "600"}, [60.0] * 3)],
    )
    def test_how_often_and_how_long_it_waits(self, hub, repository, api, facts, headers, waited):
        hub.failures.append(Failure(COMMIT, 429, headers, times=9))
        with pytest.raises(HubError, match="status 429"):
            push_card(facts, Destination("me/tiny", api=api))
        assert hub.waited == waited
        hub.failures.clear()
        hub.waited.clear()

    @for_each(
        ("error", "says"),
        [
            (json.JSONDecodeError("no value", "<html>", 0), "no JSON from"),
            (LocalTokenNotFoundError("none"), "hf auth login"),
        ],
    )
    def test_what_the_client_raises_is_said_with_what_to_do(self, api, facts, monkeypatch, error, says):
        monkeypatch.setattr(api, "model_info", Mock(side_effect=error))
        with pytest.raises(HubError, match=says):
            push_card(facts, Destination("me/tiny", api=api))

    @for_each("push", [push_card, push_results])
    def test_offline_nothing_is_asked_for_or_drawn(self, hub, api, facts, monkeypatch, push):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("hf_parcor.cards.hub.files_beside", lambda _: pytest.fail("pictures were drawn"))
        with pytest.raises(HubError, match=r"me/tiny: .*unset HF_HUB_OFFLINE"):
            push(facts, Destination("me/tiny", api=api))
        assert hub.waited == []

    def test_a_mistake_of_ours_is_none_of_the_hub(self, api, facts, monkeypatch):
        monkeypatch.setattr(api, "model_info", Mock(side_effect=RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            push_card(facts, Destination("me/tiny", api=api))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", PERMANENT)
    def test_what_does_not_is_said_and_nothing_is_lost(self, hub, repository, api, facts, name, tmp_path):
        failure, message = PERMANENT[name]
        write_card(tmp_path, facts)
        local = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        hub.failures.append(Failure(**vars(failure)))
        with pytest.raises(HubError, match=message) as caught:
            push_card(facts, Destination("me/tiny", api=api))
        assert TOKEN not in str(caught.value)
        assert "me/tiny" in str(caught.value)
        assert card_of(repository) == PERSON
        assert {path: path.read_bytes() for path in local} == local
        hub.failures.clear()
        assert push_card(facts, Destination("me/tiny", api=api)).url, "the same call succeeds later"
        assert "My own words." in card_of(repository)

    @pytest.mark.slow
    def test_somebody_who_was_faster_loses_nothing(self, hub, repository, api, facts):
        faster = PERSON.replace("My own words.", "Newer words.")

        def write():
            repository.commit({**repository.files, "README.md": faster.encode()})

        hub.failures.append(Failure(COMMIT, before=write))
        push_card(facts, Destination("me/tiny", api=api))
        assert "Newer words." in card_of(repository)
        assert "hf_parcor:begin" in card_of(repository)

    def test_an_answer_that_got_lost_opens_no_second_pull_request(self, hub, repository, api, facts):
        hub.failures.append(Failure(COMMIT, 502))
        with pytest.raises(HubError, match="status 502"):
            push_card(facts, Destination("me/tiny", create_pr=True, api=api))

    def test_a_wrong_token(self, hub, repository, facts):
        with pytest.raises(HubError, match="status 401"):
            push_card(facts, Destination("me/tiny", api=HfApi(endpoint=hub.endpoint, token="hf_secret_other")))

    def test_the_token_is_nowhere(self, hub, repository, api, facts, tmp_path):
        push_card(facts, Destination("me/tiny", api=api))
        write_card(tmp_path, facts)
        local = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        everything = [*repository.files.values(), *local]
        assert not any(TOKEN.encode() in content for content in everything)
        assert TOKEN not in json.dumps(hub.requests)

    def test_a_card_that_cannot_be_merged_is_left(self, repository, api, facts):
        repository.commit({**repository.files, "README.md": b"---\ntags: [open\n---\n# Mine\n"})
        before = card_of(repository)
        with pytest.raises(ValueError, match="front matter: expected YAML"):
            push_card(facts, Destination("me/tiny", api=api))
        assert card_of(repository) == before
