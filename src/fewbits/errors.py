"""The one error type a user sees when input is wrong."""

from __future__ import annotations


class FewbitsError(ValueError):
    """Bad input or an impossible request. The message names the site, file or option and says what to do."""
