"""Shares in a model repository of the Hugging Face hub (or of what HF_ENDPOINT names), by its own client.

The token is the client's: HF_TOKEN, or that of `hf auth login`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from allocator.contract.documents import parse_json
from allocator.contract.errors import ContractError, GammaError, InputError
from allocator.sidecar.sharing import SHARE_NAME, LocalFile, Share, SharedFile, reaching
from allocator.sidecar.store import document_text

__all__ = ["HubRemote"]

# A commit each: what was committed is not sent again when the next one fails.
_COMMIT_FILES, _COMMIT_BYTES = 500, 4 << 30
_CARD = """---
tags: [gamma-scores]
library_name: gamma-vllm
---

# Scores of {name}

What each width of each module of {model} costs, learned by `{method}` with GAMMA: enough to solve for any memory.

```
gamma store pull hf://{repository} --store /store
gamma prepare {name} --store /store --out /served --gpu rtx4090
```
"""


class HubRemote:
    """A branch, tag or commit of a repository; pushed to a branch, `main` unless another is named."""

    def __init__(self, address: str, repository: str, revision: str | None) -> None:
        self.address, self._repository, self._revision = address, repository, revision
        self._commit: str | None = None
        disable_progress_bars()

    def read(self) -> bytes:
        with self._asking():
            self._commit = HfApi().model_info(self._repository, revision=self._revision).sha
            return Path(hf_hub_download(self._repository, SHARE_NAME, revision=self._commit)).read_bytes()

    def fetch(self, file: SharedFile, target: Path, tell: Callable[[int], None]) -> None:
        with self._asking():
            # Beside the target, where what was cut off stays for the next call.
            folder = target.parent / "hub"
            found = hf_hub_download(self._repository, file.path, revision=self._commit, local_dir=folder)
        os.replace(found, target)
        tell(file.nbytes)

    def push(self, share: Share, local: LocalFile, tell: Callable[[int], None]) -> str:
        api, branch = HfApi(), self._revision or "main"
        with self._asking():
            former = self._former(api, branch)
            for files in _commits(share.files[:-1]):
                self._commit_files(api, branch, files, local)
                tell(sum(file.nbytes for file in files))
            index = document_text(share).encode()
            card = _CARD.format(
                name=share.entry.name,
                model=share.entry.model.name,
                method=share.entry.method,
                repository=self._repository,
            )
            stale = sorted({file.path for file in former} - {file.path for file in share.files})
            extra: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationAdd(SHARE_NAME, index)]
            extra += map(CommitOperationDelete, stale)
            if not api.file_exists(self._repository, "README.md", revision=branch):
                extra.append(CommitOperationAdd("README.md", card.encode()))
            commit = self._commit_files(api, branch, share.files[-1:], local, extra)
            tell(share.files[-1].nbytes)
        return f"hf://{self._repository}@{commit}"

    def _former(self, api: HfApi, branch: str) -> list[SharedFile]:
        """The files of the share that is there; repository and branch are made where they are not."""
        try:
            api.model_info(self._repository)
        except RepositoryNotFoundError:
            api.create_repo(self._repository, private=True)
        if branch != "main":
            api.create_branch(self._repository, branch=branch, exist_ok=True)
        try:
            there = hf_hub_download(self._repository, SHARE_NAME, revision=branch)
            return Share.parse(parse_json(Path(there).read_text(encoding="utf-8"), SHARE_NAME), SHARE_NAME).files
        except (EntryNotFoundError, ContractError):
            return []

    def _commit_files(
        self,
        api: HfApi,
        branch: str,
        files: list[SharedFile],
        local: LocalFile,
        extra: list[CommitOperationAdd | CommitOperationDelete] | None = None,
    ) -> str:
        with ExitStack() as open_files:
            operations = list(extra or [])
            for file in files:
                addition = CommitOperationAdd(file.path, str(open_files.enter_context(local(file))))
                if addition.upload_info.sha256.hex() != file.digest.removeprefix("sha256:"):
                    raise ContractError(f"{file.path} of the store is damaged: its content is not {file.digest}")
                operations.append(addition)
            message = f"Scores {files[0].path}" if len(files) == 1 else f"Scores: {len(files)} files"
            done = api.create_commit(self._repository, operations, commit_message=message, revision=branch)
            return str(done.oid)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with reaching(self.address):
            try:
                yield
            except GammaError:
                raise
            except GatedRepoError:
                raise InputError(f"{self.address}: the hub asks for a token that may read it; set HF_TOKEN") from None
            except RepositoryNotFoundError:
                raise InputError(
                    f"{self.address}: there is no such repository, or it is private; is the name right, and HF_TOKEN "
                    "set (or `hf auth login` done)?"
                ) from None
            except RevisionNotFoundError:
                raise InputError(f"{self.address}: the repository has no such revision") from None
            except EntryNotFoundError:
                raise InputError(f"{self.address}: no scores are shared there (it has no {SHARE_NAME})") from None
            except HfHubHTTPError as error:
                if error.response is not None and error.response.status_code in (401, 403):
                    raise InputError(
                        f"{self.address}: the hub refuses ({str(error).splitlines()[0][:200]}); HF_TOKEN needs "
                        "the right to write there for a push, to read for a pull"
                    ) from None
                raise


def _commits(files: list[SharedFile]) -> Iterator[list[SharedFile]]:
    part: list[SharedFile] = []
    for file in files:
        if part and (len(part) == _COMMIT_FILES or sum(f.nbytes for f in part) + file.nbytes > _COMMIT_BYTES):
            yield part
            part = []
        part.append(file)
    if part:
        yield part
