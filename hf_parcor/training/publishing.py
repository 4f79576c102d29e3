"""A Trainer whose pushes to the Hub lose nothing that a person wrote on the card there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from huggingface_hub import CommitOperationDelete, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_parcor.model_card.card import Card, read_card
from hf_parcor.model_card.commit import HTTP_ERROR, card_on_hub, paths_in
from hf_parcor.model_card.folder import CARD, is_ours, read_text
from hf_parcor.stored_record import replace_text
from hf_parcor.training.trainer_card import CardMixin, folder_of

logger = logging.get_logger(__name__)


class PublishingMixin(CardMixin):
    """Gives any Trainer a card with the last robustness evaluation, here and on the Hub; put it before its class.

    Before each push, also those that `hub_strategy` asks for while the model trains, a card that a person changed on
    the Hub is taken over. Where a person changed the card here, too, that one is pushed, and a warning says where the
    other one is. A push while the model trains makes no card where there is none, as with the Trainer; one that is
    there says what is known of the weights that are pushed.
    """

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push as the Trainer does; a card that a person changed on the Hub is taken over first."""
        there: list[str] = []
        if self.is_world_process_zero():
            token = token if token is not None else self.args.hub_token
            if getattr(self, "hub_model_id", None) is None:
                self.init_hf_repo(token=token, private=private)
            self._finish_current_push()
            there = self._take_card_of_hub(HfApi(token=token), revision or self.args.hub_revision)
        pushed = super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        self._remove_old_results(HfApi(token=token), revision or self.args.hub_revision, there)
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push as the Trainer does while it trains, unless the card on the Hub cannot be kept."""
        last: Any = self.push_in_progress
        busy = last is not None and not last.is_done()
        asked = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not busy)
        if not asked or not self.is_world_process_zero() or self._card_is_ready():
            super()._push_from_checkpoint(checkpoint_folder)

    def _card_is_ready(self) -> bool:
        """Let the card be that of the Hub, with what is known of the weights of now; say whether that went well."""
        api, revision = HfApi(token=self.args.hub_token), self.args.hub_revision
        path = folder_of(self.args) / CARD
        try:
            there = self._take_card_of_hub(api, revision)
            if path.exists():
                text = read_text(path)
                facts = self.robustness_facts(str(self.hub_model_id).rpartition("/")[2])
                self._write_card(text, facts, generated=read_card(text).is_generated)
                self._remove_old_results(api, revision, there)
        except (OSError, ValueError, HTTP_ERROR) as error:  # no reason to end a training
            logger.warning(
                f"{self.hub_model_id}: expected to keep its card, got {type(error).__name__}: {error}. Nothing is "
                "pushed at this step, so that nothing is overwritten."
            )
            return False
        return True

    def _remove_old_results(self, api: HfApi, revision: str | None, there: Iterable[str]) -> None:
        """Remove from the Hub what lies beside the card there, and no more here: it is of other weights."""
        old = [name for name in there if is_ours(name) and not (folder_of(self.args) / name).exists()]
        if old:
            operations = [CommitOperationDelete(name) for name in old]
            message = "Results of other weights"
            api.create_commit(str(self.hub_model_id), operations, commit_message=message, revision=revision)

    def _take_card_of_hub(self, api: HfApi, revision: str | None) -> list[str]:
        """Let the card here be that of the Hub, unless a person changed this one, and return the files there."""
        path = folder_of(self.args) / CARD
        repo_id = str(self.hub_model_id)
        there, info = card_on_hub(api, repo_id, revision)
        here = read_text(path)
        if not there or there == here:
            return paths_in(info)
        if not here or read_card(here).is_untouched:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, there)
        elif _around(read_card(there)) != _around(read_card(here)) and not read_card(there).is_untouched:
            logger.warning(
                f"{path} and the card of {repo_id} were both changed by hand. The first is pushed; the other stays in "
                f"the history of the repository, at {info.sha}."
            )
        return paths_in(info)


def _around(card: Card) -> tuple[str, str]:
    return card.before.strip(), card.after.strip()
