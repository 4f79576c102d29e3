"""Which radius, and how many steps: a search over the settings of a defense."""

from hf_parcor.search.epsilon import search_epsilon
from hf_parcor.search.golden_section import golden_section_maximum
from hf_parcor.search_record import SearchRecord, SearchTrial

__all__ = ["SearchRecord", "SearchTrial", "golden_section_maximum", "search_epsilon"]
