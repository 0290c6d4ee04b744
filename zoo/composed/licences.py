"""Licences by the names that the hub has for them, as a card's `license` states them."""

import re

from zoo.registry import ZooError, nearest

# The identifiers of the hub's documentation ("Licenses" in docs/hub of huggingface/hub-docs, at commit 008d54d), and
# those that came later.
_LISTED = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown
"""
IDENTIFIERS = frozenset(_LISTED.split())
OTHER = "other"
_NAME = re.compile(r"[a-z0-9][a-z0-9.+_-]*")


def licence_given(word: str, option: str) -> str:
    """Return the licence that a person named: one of the hub's identifiers, or what follows `other:`.

    Args:
        word: as typed; empty: none was.
        option: for the message.

    Raises:
        ZooError: the hub has no such identifier, or `other` is without a name.
    """
    name = word.strip().lower()
    if not name or name in IDENTIFIERS:
        return name
    own = f"{option} {OTHER}:<name>"
    if name == OTHER or name.startswith(f"{OTHER}:"):
        name = name.removeprefix(OTHER).removeprefix(":")
        if not _NAME.fullmatch(name):
            raise ZooError(
                f"{option} {word}: a licence that the hub has no identifier for needs a name of letters, digits, dots "
                f"and dashes: {own}, and its text as LICENSE in the folder."
            )
        return name
    near = nearest(name, IDENTIFIERS)
    hint = (
        f" Did you mean {near[0]!r}?" if near else " Common ones: apache-2.0, mit, cc-by-4.0, cc-by-nc-4.0, llama3.1."
    )
    raise ZooError(f"{option} {word}: the hub has no licence of that name.{hint} Another one: {own}.")


def on_card(name: str) -> tuple[str, str]:
    """Return the `license` and the `license_name` of a card; the second is empty for an identifier of the hub."""
    return (name, "") if not name or name in IDENTIFIERS or name == OTHER else (OTHER, name)
