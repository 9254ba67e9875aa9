"""Names of models on the Hugging Face hub: `org/name`, or with scheme and revision `hf://org/name@revision`."""

import re

from allocator.contract.errors import InputError

__all__ = ["HUB_SCHEME", "split_hub"]

HUB_SCHEME = "hf://"
_REFERENCE = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def split_hub(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """Id and revision that `model` means; what is no `hf://` is given back as it is.

    Raises InputError for another form, and for two revisions.
    """
    if not model.startswith(HUB_SCHEME):
        return model, revision
    match = _REFERENCE.fullmatch(model.removeprefix(HUB_SCHEME))
    if match is None:
        raise InputError(f"{model}: expected hf://org/name or hf://org/name@revision")
    if revision is not None and match["revision"] not in (None, revision):
        raise InputError(f"{model} names a revision, --revision {revision} another; give one of them")
    return match["id"], match["revision"] or revision
