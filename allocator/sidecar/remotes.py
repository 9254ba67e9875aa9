"""Where shares are, by address: a repository of the Hugging Face hub or of an OCI registry."""

import re

from allocator.contract.errors import InputError
from allocator.sidecar.sharing import Remote

__all__ = ["open_remote"]

_HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_OCI = re.compile(
    r"oci://(?P<host>[A-Za-z0-9.-]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?)/"
    r"(?P<repository>[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*)"
    r"(:(?P<tag>\w[\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))"
)
_FORMS = "hf://owner/name@revision, oci://host/repository:tag or oci://host/repository@sha256:..."


def open_remote(address: str) -> Remote:
    """Raises InputError for another form, or when the package for it is not here."""
    hub, registry = _HUB.fullmatch(address), _OCI.fullmatch(address)
    try:
        if hub:
            from allocator.sidecar.remote_hub import HubRemote

            return HubRemote(address, hub["repository"], hub["revision"])
        if registry:
            from allocator.sidecar.remote_registry import RegistryRemote

            return RegistryRemote(
                address, registry["host"], registry["repository"], registry["tag"], registry["digest"]
            )
    except ModuleNotFoundError as error:
        raise InputError(f"{address}: needs the package {error.name}; pip install 'gamma-vllm[share]'") from None
    raise InputError(f"{address}: expected {_FORMS}")
