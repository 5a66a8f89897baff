"""The licence of published weights, by the identifiers that the Hub knows.

They are those of https://huggingface.co/docs/hub/repositories-licenses. The Hub refuses others when a card is uploaded,
which would be at the end of a training run.
"""

from dataclasses import dataclass
from difflib import get_close_matches

OTHER = "other"
_NAMES = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m
deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1
lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl
postgresql unknown unlicense wtfpl zlib
"""
IDENTIFIERS = frozenset(_NAMES.split())
# What to do about other terms: options of `python -m ride_bf.publish`
_OWN_TERMS = "For terms of its own use --license other --license_name NAME --license_link ADDRESS"


def check_identifier(identifier: str, option: str = "--license", remedy: str = _OWN_TERMS) -> None:
    """Raises ValueError for an identifier that the Hub does not know. It names similar ones, and then the `remedy`."""
    if identifier not in IDENTIFIERS:
        similar = get_close_matches(identifier.lower(), IDENTIFIERS, 3) or ["mit", "cc-by-nc-4.0"]
        raise ValueError(
            f"{option}: the Hub knows no licence {identifier!r}; similar ones are "
            f"{', '.join(sorted(similar))}. {remedy}"
        )


@dataclass(frozen=True)
class Licence:
    """An identifier of the Hub; of `other`, also the name and, if there is one, the address of the terms.

    Raises ValueError as `check_identifier` does, and for a name that is missing or cannot act.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self):
        check_identifier(self.identifier)
        if (self.identifier == OTHER) != (self.name is not None) or (self.link is not None and self.name is None):
            raise ValueError(
                f"licence {self.identifier}: a licence {OTHER} needs --license_name, and may have --license_link; the "
                "others have neither"
            )

    def as_metadata(self) -> dict[str, str]:
        """The entries of a card."""
        entries = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in entries.items() if value is not None}

    def __str__(self) -> str:
        """For a sentence on the card."""
        if self.name is None:
            return f"`{self.identifier}`"
        return f"`{self.name}`" if self.link is None else f"[`{self.name}`]({self.link})"


def given_licence(identifier: str | None, name: str | None, link: str | None) -> Licence | None:
    """The licence that the options of a command name; None if they name none. Raises ValueError as `Licence` does."""
    if identifier is None and (name or link) is not None:
        raise ValueError("--license_name and --license_link cannot act without --license other")
    return None if identifier is None else Licence(identifier, name, link)
