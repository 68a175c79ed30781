"""Preference data: what a row is, where rows come from, and what is wrong with one."""

from rmfast.data.reading import preferences
from rmfast.data.records import Group, Pair, Preferences, by_question
from rmfast.errors import DataError, RowError

__all__ = ["DataError", "Group", "Pair", "Preferences", "RowError", "by_question", "preferences"]
